#!/usr/bin/env bash
# ONNX Runtime's C headers, and the shared library beside them: what building and testing the C++ library takes on Debian 12, which
# has no package of them.
#
#     cpp/get_ort_headers.sh [DIR]      default: cpp/build/ort    → DIR/include, DIR/lib/libonnxruntime.so.1
#
# The headers are those of trixie's libonnxruntime-dev, downloaded and unpacked with an apt state of its own: the system's sources and
# packages stay as they are. The library is a link to that of the onnxruntime installed for `python3`, where there is one. A
# project that has ONNX Runtime from elsewhere needs none of this: it gives CMake its own -DLLM2SLM_ORT_INCLUDE_DIR.
set -euo pipefail
out=${1:-$(cd "$(dirname "$0")" && pwd)/build/ort}
mkdir -p "$out/lib"
out=$(cd "$out" && pwd)
if [ ! -f "$out/include/onnxruntime_c_api.h" ]; then
  state=$(mktemp -d)
  trap 'rm -rf "$state"' EXIT
  mkdir -p "$state"/{lists/partial,cache/archives/partial,etc/apt.conf.d,etc/preferences.d,etc/trusted.gpg.d}
  : > "$state/status"
  mirror=$(awk '/^URIs:/ {print $2; exit}' /etc/apt/sources.list.d/*.sources 2>/dev/null || true)
  [ -n "$mirror" ] || mirror=$(awk '$1 == "deb" {for (i = 2; i <= NF; i++) if ($i ~ /^https?:/) {print $i; exit}}' /etc/apt/sources.list)
  echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror trixie main" > "$state/etc/sources.list"
  cat > "$state/apt.conf" <<EOF
Dir::Etc "$state/etc"; Dir::Etc::sourcelist "$state/etc/sources.list"; Dir::Etc::sourceparts "-"; Dir::Etc::parts "$state/etc/apt.conf.d";
Dir::State "$state"; Dir::State::lists "$state/lists"; Dir::State::status "$state/status"; Dir::Cache "$state/cache";
APT::Architecture "$(dpkg --print-architecture)"; APT::Sandbox::User "$(id -un)"; Acquire::Languages "none";
Acquire::Check-Valid-Until "false"; Acquire::Check-Date "false"; Debug::NoLocking "true";
EOF
  export APT_CONFIG="$state/apt.conf"
  apt-get update -qq > "$state/log" 2>&1 || { cat "$state/log" >&2; echo "trixie's package lists cannot be read" >&2; exit 1; }
  (cd "$state" && apt-get download -qq libonnxruntime-dev > /dev/null && dpkg -x libonnxruntime-dev_*.deb dev)
  rm -rf "$out/include"
  cp -r "$state/dev/usr/include/onnxruntime" "$out/include"
fi
library=$(python3 -c '
import glob, importlib.util, os
found = importlib.util.find_spec("onnxruntime")
print(*(glob.glob(os.path.join(os.path.dirname(found.origin), "capi", "libonnxruntime.so.*"))[:1] if found else []))')
[ -z "$library" ] || ln -sfn "$library" "$out/lib/libonnxruntime.so.1"
find "$out/include" -name onnxruntime_c_api.h
ls -d "$out"/lib/* 2>/dev/null || echo "no onnxruntime for python3: no library beside the headers"
