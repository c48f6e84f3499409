# Stages of a script that trains: each runs once, and says what it took; sourced, not run. The script sets $run, the run's folder.
#
#   stage NAME COMMAND...     runs the command under a headline
#   several COMMAND...        runs step-megatron in $ranks processes
#   unless FILE COMMAND...    runs the command where the file that it writes is not there yet
#
# The seconds of a stage, all attempts together, are kept for the report (seconds.NAME). Once it has been done (done.NAME) they
# stay: a later run finds the work done and says nothing about what it costs.

mkdir -p "$run"
counted="" began=0
stage() {
    local name="$1"
    shift
    printf '\n== %s (the stages before it: %s s)\n' "$name" "$SECONDS"
    [ -e "$run/done.$name" ] || counted="$name"
    began=$SECONDS
    "$@"
    count
    touch "$run/done.$name"
}
count() {
    [ -n "$counted" ] || return 0
    echo $(($(cat "$run/seconds.$counted" 2> /dev/null || echo 0) + SECONDS - began)) > "$run/seconds.$counted.new"
    mv "$run/seconds.$counted.new" "$run/seconds.$counted"
    counted=""
}
# An attempt that fails or is interrupted counts as well.
trap count EXIT

# The runtime gives every process its share of the cores; torchrun only wants to be told something. After a signal the step is
# finished and saved: torchrun would wait for 30 s only.
several() { OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node "$ranks" --shutdown-timeout 600 -m step_megatron.cli "$@"; }

unless() { [ -e "$1" ] || "${@:2}"; }
