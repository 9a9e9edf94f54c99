#!/bin/sh
# An arm64 Python for another kind of machine: `sh tests/arm64.sh FOLDER PYTHON` makes FOLDER/python, which qemu emulates,
# with what the tests need. Nothing of arm64 runs meanwhile: Debian's packages are unpacked, and PyPI's wheels, by PYTHON.
set -eu

for command in mmdebstrap qemu-aarch64-static; do
    if ! command -v "$command" >/dev/null; then
        echo "$command is missing: apt-get install mmdebstrap qemu-user-static" >&2
        exit 1
    fi
done
rm -rf "$1"
mkdir -p "$1"
folder=$(cd "$1" && pwd)
root=$folder/root

mmdebstrap --quiet --variant=extract --architectures=arm64 \
    --include=python3-minimal,libpython3-stdlib,libstdc++6,zlib1g bookworm "$root"
arm64=$(echo "$root"/usr/bin/python3.[0-9]*)
"$2" -m pip install --quiet --disable-pip-version-check --target "$root/usr/lib/python3/dist-packages" \
    --only-binary=:all: --python-version "${arm64##*python}" \
    --platform manylinux_2_28_aarch64 --platform manylinux_2_27_aarch64 --platform manylinux2014_aarch64 \
    numpy numba "pytest>=8.2" "hypothesis>=6.100" "ml_dtypes>=0.5"

cat >"$folder/python" <<END
#!/bin/sh
# pointers are authenticated by a mixing of qemu's own, which takes less time
export QEMU_CPU="\${QEMU_CPU:-max,pauth-impdef=on}" QEMU_LD_PREFIX="$root"
exec qemu-aarch64-static "$arm64" "\$@"
END
chmod +x "$folder/python"
# what tests start in a process of its own is emulated as well
custom=$root/usr/lib/${arm64##*/}/sitecustomize.py
rm -f "$custom"
echo "import sys; sys.executable = '$folder/python'" >"$custom"
