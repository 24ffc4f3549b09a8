# Sourced, from the root, by the scripts that run compiled programs. They work in a checkout, which they install and build first, and in the
# archive of `npm run bundle`, which needs neither npm nor Node.

# prepare: sets `node`. PD_SKIP_BUILD: what an earlier build left will do.
prepare() {
  if [ -x ./node ]; then
    node=./node
    return
  fi
  node=node
  [ -n "${PD_SKIP_BUILD:-}" ] && return
  ./scripts/install.sh && ./scripts/build.sh || return 1
  export PD_SKIP_BUILD=1 # of scripts that this one starts
}

# run_program NAME ARGS...: a program of scripts/ takes this shell's place
run_program() {
  local program="dist/scripts/$1.js"
  shift
  prepare || exit 1
  exec "$node" "$program" "$@"
}

# usage: the script's first comment is its help
usage() {
  sed -n '2,/^[^#]/s/^# \{0,1\}//p' "scripts/${0##*/}"
  exit 2
}

# bounded SECONDS COMMAND...: status 124 or 137 where that was not enough
bounded() {
  timeout --kill-after=10 "$@" </dev/null
}

# What the results scripts share: where results go, what they run on, whether only to see that everything is in place, and the command line
# that the page names, without what only says where files lie.
out=bench/results
device=cuda
small=()
line="./scripts/${0##*/}"

# results_option "$@": takes one of the options that all of them have; `taken` is then how many words to shift. Fails at any other.
results_option() {
  taken=2
  case "$1" in
    --out) out="${2:?--out needs a folder}" ;;
    --device) device="${2:?--device needs cuda or host}"; line+=" $1 $2" ;;
    --small) small=("$1"); line+=" $1"; taken=1 ;;
    *) return 1 ;;
  esac
}

# work_folder: sets `work`, a folder that goes when the script ends
work_folder() {
  work="$(mktemp -d)"
  trap 'rm -rf "$work"' EXIT
}
