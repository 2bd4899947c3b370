#!/bin/sh
# Says plainly what is missing before anything is installed. Usage: check-python.sh PYTHON
python=$1

if ! command -v "$python" >/dev/null 2>&1; then
    echo "error: '$python' is not installed. Install Python 3.10 to 3.13 (Debian: apt-get install python3 python3-venv)," >&2
    echo "       or say which to use: make PYTHON=/path/to/python3.12 ..." >&2
    exit 1
fi

version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])') || exit 1
case $version in
    3.10 | 3.11 | 3.12 | 3.13) ;;
    *)
        echo "error: '$python' is Python $version; this project needs 3.10 to 3.13." >&2
        echo "       Say which to use: make PYTHON=/path/to/python3.12 ..." >&2
        exit 1
        ;;
esac

if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    echo "error: '$python' can't make virtual environments: its venv or ensurepip module is missing." >&2
    echo "       Debian, Ubuntu: apt-get install python$version-venv (or python3-venv)" >&2
    exit 1
fi
