#!/bin/sh
# Write images/*/*.lock: exact versions with hashes, for CPython 3.11 on Linux x86-64.
#
#     sh images/lock.sh [CPU_WHEELS]
#
# Needs uv. Versions are those of images/line/requirements.lock, which the tests run with.
# CPU_WHEELS: where torch for CPUs is, an index page or a directory.
set -eu
cd "$(dirname "$0")"
cpu_wheels=${1:?give the address or directory of torch wheels for CPUs}
versions=$(mktemp)
trap 'rm -f "$versions"' EXIT
grep -E '^[A-Za-z]' line/requirements.lock > "$versions"

lock() {
    uv pip compile --quiet --generate-hashes --no-annotate --no-header \
        --python-version 3.11 --python-platform x86_64-manylinux_2_28 -c "$versions" "$@"
}

echo "torch"
lock torch/requirements.in -o torch/cuda.lock > /dev/null
lock torch/requirements.in --find-links "$cpu_wheels" -o torch/cpu.lock > /dev/null
in_torch=$(sed -n 's/^\([a-z0-9-]*\)==.*/--no-emit-package \1/p' torch/cuda.lock)
echo "tools"
uv pip compile --quiet --generate-hashes --no-annotate --no-header --python-version 3.11 \
    --python-platform x86_64-manylinux_2_28 tools/requirements.in > tools/requirements.lock
for set in light train gguf gptq evaluate publish; do
    echo "$set"
    # gptqmodel asks for a protobuf that kfp's own dependencies exclude; here they do not meet.
    if [ "$set" = gptq ]; then sed -i '/^protobuf==/d' "$versions"; fi
    # What the layer below has is left out.
    shared=$(grep -q '^torch$' "$set/requirements.in" && echo "$in_torch" || true)
    # shellcheck disable=SC2086
    lock "$set/requirements.in" --find-links "$cpu_wheels" $shared > "$set/requirements.lock"
    for alone in alone.in "$set/alone.in"; do
        if [ -f "$alone" ]; then lock "$alone" --no-deps >> "$set/requirements.lock"; fi
    done
done
