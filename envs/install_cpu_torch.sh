#!/usr/bin/env bash
# Installs the CPU build of torch: from pip's usual index if it has one, otherwise from PyTorch's own
# index for CPU builds.
set -euo pipefail
version=$(grep '^torch==' envs/constraints.txt)
index=https://download.pytorch.org/whl/cpu
if "${PIP:-pip}" install --quiet --dry-run --no-deps --report - "$version" 2>/dev/null | grep -q '+cpu'; then
    "${PIP:-pip}" install --quiet "$version"
else
    "${PIP:-pip}" install --quiet --extra-index-url "$index" "$version+cpu" || {
        echo "$index has no CPU build of torch: installing the usual one, which includes CUDA" >&2
        "${PIP:-pip}" install --quiet "$version"
    }
fi
