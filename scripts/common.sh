# Sourced, from the root, by scripts that run compiled programs. They work in a checkout, which they install and build first, and in the archive
# of `npm run bundle`, where they need neither npm nor Node.

# prepare: sets `node`. With PD_SKIP_BUILD it uses the last build.
prepare() {
  if [ -x ./node ]; then
    node=./node
    return
  fi
  node=node
  [ -n "${PD_SKIP_BUILD:-}" ] && return
  ./scripts/install.sh && ./scripts/build.sh || return 1
  export PD_SKIP_BUILD=1 # for scripts started by this one
}

# run_program NAME ARGS...: replaces this shell by a program of scripts/
run_program() {
  local program="dist/scripts/$1.js"
  shift
  prepare || exit 1
  exec "$node" "$program" "$@"
}

# usage: prints the script's first comment
usage() {
  sed -n '2,/^[^#]/s/^# \{0,1\}//p' "scripts/${0##*/}"
  exit 2
}

# bounded SECONDS COMMAND...: exit status 124 or 137 if it took longer
bounded() {
  timeout --kill-after=10 "$@" </dev/null
}

# Defaults of the results scripts: where results go, the device, whether it is a small trial run, and the command line as the page shows it,
# without options that only say where files are.
out=bench/results
device=cuda
small=()
line="./scripts/${0##*/}"

# results_option "$@": reads an option common to all results scripts and sets `taken`, the number of words to shift; fails on any other.
results_option() {
  taken=2
  case "$1" in
    --out) out="${2:?--out needs a directory}" ;;
    --device) device="${2:?--device needs cuda or host}"; line+=" $1 $2" ;;
    --small) small=("$1"); line+=" $1"; taken=1 ;;
    *) return 1 ;;
  esac
}

# work_folder: sets `work`, a directory that is removed when the script ends
work_folder() {
  work="$(mktemp -d)"
  trap 'rm -rf "$work"' EXIT
}

# llama_8b FOLDER: sets `model` to the checkpoint llama-8b in it, and creates that if it is not there
llama_8b() {
  local script="${0##*/}"
  model="$1/llama-8b"
  [ -f "$model/config.json" ] && return
  echo "${script%.sh}: creating llama-8b" >&2
  bounded 180 python3 scripts/model-reference/checkpoint.py --out "$1" --shape llama-8b --tokenizer models/demo >&2 && return
  echo "${script%.sh}: llama-8b could not be created" >&2
  return 1
}
