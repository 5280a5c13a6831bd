# Training on NVIDIA GPUs, driver 580 or newer. docs/docker.md has the lines that build and run it.
# The toolkit that this torch was built with: nvcc compiles operators when a GPU first needs them.
FROM nvidia/cuda:13.0.3-devel-ubuntu24.04

# ssh and pdsh for deepspeed on several machines, git for the commit that a run records
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        build-essential ca-certificates git openssh-client pdsh python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

ENV PATH=/opt/venv/bin:$PATH PIP_NO_CACHE_DIR=1
WORKDIR /opt/ilvr_ds
COPY constraints.txt ./
RUN python3 -m venv /opt/venv \
    && pip install --upgrade pip setuptools wheel \
    && pip install -c constraints.txt --index-url https://download.pytorch.org/whl/cu130 torch
RUN pip install -c constraints.txt bitsandbytes liger-kernel nvidia-ml-py

# flash-attn is compiled, for an hour or more: docker build --build-arg FLASH_ATTN=1
ARG FLASH_ATTN=0
RUN if [ "$FLASH_ATTN" = 1 ]; then pip install -c constraints.txt --no-build-isolation 'flash-attn>=2.7'; fi

COPY setup.py pyproject.toml README.md LICENSE ./
COPY csrc csrc
COPY ds_configs ds_configs
COPY launch launch
COPY ilvr_ds ilvr_ds
RUN pip install -c constraints.txt -e '.[ui,formats,serve]'

# Build with your own number, so that what it writes into your folders is yours; Ubuntu's user has 1000.
ARG UID=1000
RUN userdel --remove ubuntu \
    && useradd --create-home --uid "$UID" ilvr \
    && install -d -o ilvr -g ilvr /cache /project
USER ilvr
ENV HF_HOME=/cache/huggingface TORCH_EXTENSIONS_DIR=/cache/torch_extensions TRITON_CACHE_DIR=/cache/triton
WORKDIR /project
ENTRYPOINT ["ilvr-ds"]
CMD ["--help"]
