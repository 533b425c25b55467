# PortLLM on a CPU, with what trains and evaluates.
#
#     docker build -t portllm .
#     docker run --rm -v "$PWD:/work" -u "$(id -u):$(id -g)" portllm inspect my-adapter

FROM python:3.12-slim AS built
# A compiler of any version makes the same loops, and Debian drops its old packages.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
WORKDIR /source
COPY . .
RUN pip wheel --no-cache-dir --no-deps -w /wheels .

FROM python:3.12-slim
COPY constraints.txt /tmp/
# Torch's own CPU build first: the one that pip finds by itself brings gigabytes for GPUs.
RUN pip install --no-cache-dir -c /tmp/constraints.txt --index-url https://download.pytorch.org/whl/cpu torch
RUN --mount=type=bind,from=built,source=/wheels,target=/wheels \
    pip install --no-cache-dir -c /tmp/constraints.txt "$(echo /wheels/portllm-*.whl)[live]"
ENV HOME=/home/portllm PORTLLM_CACHE=/home/portllm/cache HF_HOME=/home/portllm/huggingface
RUN mkdir -m 777 /home/portllm
WORKDIR /work
ENTRYPOINT ["portllm"]
CMD ["--help"]
