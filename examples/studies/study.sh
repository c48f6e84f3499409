# What the scripts of studies of PPO share; sourced, not run.
#
#   study NAME [key=value ...] [RUN] [key=value ...]
#
# STEP_DATA  the folder of downloads (default data)

export STEP_DATA="${STEP_DATA:-data}"
source examples/environment.sh

study() {
    local name="$1" start=runs/quickstart/sft settings=()
    shift
    for argument in "$@"; do
        case "$argument" in
            *=*) settings+=("$argument") ;;
            *) start="$argument" ;;
        esac
    done
    [ -f "$start/run.json" ] || { echo "error: $start/run.json is missing; run examples/quickstart.sh first, or name a run" >&2; exit 1; }
    step-megatron study "$name" --start "$start" --out "runs/studies/$name" --config examples/studies/ppo.yaml --jobs 2 "${settings[@]}"
}
