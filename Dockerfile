# syntax=docker/dockerfile:1
# Flux-vLLM on vLLM's own CUDA image. Build: docker build -t flux-vllm:0.1.0-vllm0.33.0 .
# Serve: docker run --gpus all --ipc=host -p 8000:8000 flux-vllm:0.1.0-vllm0.33.0 MODEL [arguments of vllm serve]
FROM vllm/vllm-openai:v0.33.0

# The checkout is only lent to the build; the wheel made of it is what stays.
RUN --mount=type=bind,target=/source,rw bash /source/deploy/install.sh /source \
    && install -D --mode 755 --target-directory /opt/flux /source/deploy/start.sh /source/deploy/health.py \
    && useradd --create-home --uid 10001 flux \
    && install --directory --owner flux --group flux /home/flux/.cache /home/flux/.cache/huggingface

USER 10001
WORKDIR /home/flux
ENV HF_HOME=/home/flux/.cache/huggingface \
    VLLM_PLUGINS=flux,flux_live \
    VLLM_NO_USAGE_STATS=1
EXPOSE 8000
# A large model takes minutes to load: only after that do failed checks count.
HEALTHCHECK --start-period=15m --interval=10s --timeout=6s --retries=6 \
    CMD ["python3", "/opt/flux/health.py"]
ENTRYPOINT ["/opt/flux/start.sh"]
