"""Read by each interpreter that a test starts: Python imports it by its name.

Imports make millions of objects that stay; to look through them for garbage every few hundred more
takes a third of the time to import vLLM.
"""

import gc

gc.set_threshold(100_000, 50, 100)
