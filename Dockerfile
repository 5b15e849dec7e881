# docker build --target cpu -t megatron_opd:cpu .    two cores, no GPU
# docker build -t megatron_opd:gpu .                 x86-64 with NVIDIA GPUs; never built where this was written
#
# USER_ID   of the user that both run as: what a run writes into a mounted folder is that user's

# Python 3.11, as everything in docs/correctness.md ran on.
FROM python:3.11.15-slim-bookworm AS cpu

ARG USER_ID=1000

LABEL org.opencontainers.image.title="megatron_opd, CPU" \
      org.opencontainers.image.description="On-policy distillation (StableOPD) on Megatron-Core and SGLang, without a GPU" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.base.name="docker.io/library/python:3.11.15-slim-bookworm"

# Debian deletes a version when the next comes, so a pinned one would soon build no more; the base image's tag names the release.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends make \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --non-unique --uid "$USER_ID" opd \
    && install --directory --owner opd --group opd /opt/megatron_opd

WORKDIR /opt/megatron_opd
# By number, as Kubernetes wants it for runAsNonRoot.
USER $USER_ID
ENV HOME=/home/opd \
    PATH=/opt/megatron_opd/.venv/bin:$PATH

# What the package's metadata are made of, and no more, so that a change of the source keeps the layer of the dependencies.
COPY --chown=opd:opd Makefile pyproject.toml README.md LICENSE ./
COPY --chown=opd:opd megatron_opd/__init__.py megatron_opd/
COPY --chown=opd:opd megatron_opd/report/assets/vendor/uPlot.LICENSE megatron_opd/report/assets/vendor/
COPY --chown=opd:opd docker/cpu-setup.sh docker/
# PyPI's torch for Linux is a CUDA build of several GB.
RUN --mount=type=cache,target=/tmp/pip,uid=$USER_ID \
    PIP_CACHE_DIR=/tmp/pip TORCH_INDEX=https://download.pytorch.org/whl/cpu docker/cpu-setup.sh

COPY --chown=opd:opd . .
# A checkout makes pyproject.toml newer than the layer above, where its content is the same: make would install all again.
RUN touch .venv/.installed

CMD ["make", "demo"]


# 26.07 is the last image whose torch is a 2.13 (2.13.0a0+9186a08b2c.nv26.07; 26.05 has 2.12, 26.08 and 26.09 have 2.14), which is what
# sglang 0.5.21 pins: tensors go from the trainer's torch to SGLang's by CUDA IPC. Python 3.12, CUDA 13.3, Transformer Engine 2.17. By what
# others printed in these images: NVIDIA's own release notes could not be read, nor the image pulled. The rest of this stage fails rather
# than go on where the image is other than that.
FROM nvcr.io/nvidia/pytorch:26.07-py3 AS gpu

ARG USER_ID=1000

LABEL org.opencontainers.image.title="megatron_opd" \
      org.opencontainers.image.description="On-policy distillation (StableOPD) on Megatron-Core and SGLang" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.base.name="nvcr.io/nvidia/pytorch:26.07-py3"

# As above, of Ubuntu.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --non-unique --uid "$USER_ID" opd \
    && install --directory --owner opd --group opd /opt/megatron_opd

# SGLang's torch and transformers are not the trainer's. PIP_CONSTRAINT, where the base image has it, names NVIDIA's builds, which no index
# has: they are for the trainer's environment.
COPY docker/sglang-requirements.txt /opt/sglang/requirements.txt
RUN --mount=type=cache,target=/root/.cache/pip \
    python3 -m venv /opt/sglang/venv \
    && env --unset=PIP_CONSTRAINT /opt/sglang/venv/bin/pip install --requirement /opt/sglang/requirements.txt
COPY --chmod=755 docker/sglang-python /opt/sglang/bin/python

WORKDIR /opt/megatron_opd
COPY pyproject.toml ./
COPY docker/gpu_setup.py docker/
RUN --mount=type=cache,target=/root/.cache/pip \
    python docker/gpu_setup.py trainer \
    && python docker/gpu_setup.py share-nccl /opt/sglang/bin/python

COPY --chown=opd:opd . .
# Without dependencies: NVIDIA's torch is 2.13.0a0, which pip does not take for the 2.13.0 of pyproject.toml.
RUN --mount=type=cache,target=/root/.cache/pip \
    env --unset=PIP_CONSTRAINT python -m pip install --no-deps --editable . \
    && chown --recursive opd:opd megatron_opd.egg-info

USER $USER_ID
# The base image sets it to 1, with which products of fp32 matrices run in TF32: `megatron-opd audit` would fail.
ENV HOME=/home/opd \
    TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=0

CMD ["megatron-opd", "--help"]
