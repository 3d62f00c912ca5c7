# Shared by the scripts of this folder: source it, do not run it.
# shellcheck shell=bash disable=SC2034

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="$ROOT/.venv"
BUILD="$ROOT/build"

say() { printf '%s\n' "$*"; }

# One line on stderr, then the end.
fail() {
  printf '%s: error: %s\n' "$(basename "$0")" "$*" >&2
  exit 1
}

# step TEXT COMMAND...: runs the command with its output in a log, which is shown only if it fails.
step() {
  local text="$1" started=$SECONDS
  shift
  if ! "$@" >"$LOG" 2>&1 </dev/null; then
    tail -n 40 "$LOG" >&2
    fail "$text: '$*' failed; all of its output is in $LOG"
  fi
  say "  $text: $((SECONDS - started)) s"
}
