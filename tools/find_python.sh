#!/bin/sh
# Prints the path of a Python that can carry the project: 3.12 or newer, able to make virtual environments.
# 3.12 comes first because every wheel the project pins exists for it; a name on PATH is believed only if it runs
# (pyenv leaves shims for versions that are not selected, and they fail).

usable() {
    "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1
}

real_path() {
    "$1" -c 'import sys; print(sys.executable)'
}

if [ -n "$PYTHON" ]; then
    if usable "$PYTHON"; then real_path "$PYTHON"; exit 0; fi
    echo "error: PYTHON=$PYTHON is not a Python 3.12 or newer with venv; give another, or leave PYTHON unset" >&2
    exit 2
fi

pyenv_root=${PYENV_ROOT:-$HOME/.pyenv}
for minor in 12 13 14; do
    for candidate in "python3.$minor" "$pyenv_root"/versions/3."$minor"*/bin/python; do
        if usable "$candidate"; then real_path "$candidate"; exit 0; fi
    done
    if command -v pyenv >/dev/null 2>&1; then
        prefix=$(pyenv prefix "3.$minor" 2>/dev/null) || continue
        if usable "$prefix/bin/python"; then real_path "$prefix/bin/python"; exit 0; fi
    fi
done
for candidate in python3 python; do
    if usable "$candidate"; then real_path "$candidate"; exit 0; fi
done

cat >&2 <<'MESSAGE'
error: no Python 3.12 or newer with venv was found on PATH or under pyenv (megatron-core 0.19 needs 3.12); install one:
  Debian, Ubuntu   apt-get install python3.12 python3.12-venv
  Fedora           dnf install python3.12
  macOS            brew install python@3.12
  pyenv            pyenv install 3.12
  conda            conda create -n ra3 python=3.12, then 'make PYTHON=/path/to/its/bin/python'
MESSAGE
exit 2
