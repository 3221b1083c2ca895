# The environment of a training process: Python, exact versions, and a copy of this project.
#
#   docker build -t lfm .                                                            one for CUDA 13 GPUs
#   docker build -t lfm-cpu --build-arg BASE=debian:12 --build-arg CONSTRAINTS=cpu --build-arg GPU_EXTRAS= .  one without
#   docker build -t lfm --secret id=pip,src=pip.conf .                               packages from another index
#
# Any Debian or Ubuntu with Python 3.10 to 3.13 is a base; constraints/*.txt say which Python they were made with.
# torch brings CUDA's libraries itself; the extra `cuda` has the compiler of the reservoir's kernel, `flash-attn` the
# fastest attention and grouped products.
ARG BASE=nvidia/cuda:13.0.1-base-ubuntu24.04
FROM ${BASE}

# The compiler and Python's headers are for triton, which builds its launchers on first use; git names the commit of a
# mounted checkout.  Versions are the base's own: they differ from base to base.
# hadolint ignore=DL3008
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        ca-certificates g++ gcc git libc6-dev python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --no-log-init --create-home --uid 10001 lfm \
    && install --directory --owner=lfm /home/lfm/lfm

WORKDIR /home/lfm/lfm
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1

# Dependencies alone, of a package without code, in a layer that only other versions make anew.  torch is named so that
# its exact build is taken.  The package itself goes again: the project's files come by a path, its command by a script.
ARG CONSTRAINTS=gpu
ARG GPU_EXTRAS=,cuda,flash-attn
COPY pyproject.toml ./
COPY constraints ./constraints
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    python3 -m venv /opt/venv \
    && torch=$(grep -i '^torch==' "constraints/$CONSTRAINTS.txt") \
    && mkdir lfm data_pipeline configs && echo '__version__ = "0"' >lfm/__init__.py && touch README.md LICENSE \
    && pip install --no-cache-dir --disable-pip-version-check --constraint "constraints/$CONSTRAINTS.txt" \
        "$torch" ".[parallel,datasets,fast-tokenizer,dedup,wandb,remote,hf,serve,medical$GPU_EXTRAS]" \
    && pip uninstall --yes lfm-training \
    && rm -rf lfm data_pipeline configs README.md LICENSE

# The project's own files by a path, not a copy: a checkout on PYTHONPATH goes before it.
COPY --chown=lfm:lfm . .
RUN pwd >"$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/lfm.pth" \
    && printf '#!/bin/sh\nexec python -m lfm "$@"\n' >/opt/venv/bin/lfm && chmod +x /opt/venv/bin/lfm

USER 10001
CMD ["python", "launch/pretrain.py", "--help"]
