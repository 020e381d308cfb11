"""The container's health check: exit code 0 if the server answers /health within 5 s."""

import os
import sys
import urllib.request

URL = f"http://127.0.0.1:{os.environ.get('FLUX_PORT', '8000')}/health"

if __name__ == "__main__":
    try:
        urllib.request.urlopen(URL, timeout=5).close()
    except OSError as error:
        sys.exit(f"{URL}: {error}")
