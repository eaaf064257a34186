#!/usr/bin/env bash
# What the images install, as root, in a folder with the files that the Makefile's install needs: a compiler, which
# DeepSpeed, Triton and torch.compile use at run time, and the pinned packages of requirements.txt in /opt/venv.
set -euo pipefail
export DEBIAN_FRONTEND=noninteractive PIP_NO_CACHE_DIR=1
apt-get update
apt-get install -y --no-install-recommends ca-certificates g++ gcc libaio-dev make python3 python3-dev python3-venv
rm -rf /var/lib/apt/lists/*
make install VENV=/opt/venv PYTHON=python3
