# shellcheck shell=bash
# What torchrun.sh and deepspeed.sh share; they source it. `retry COMMAND...` runs a launcher until the run is at its end.
#
# A run goes on from its last checkpoint when the same command is given again, so whatever ends early is simply started
# again: a host that was not there yet, a killed process, a lost host. It is given up, with the launcher's exit status,
#   - when it was started again RETRIES times in a row and no new checkpoint came of it, and
#   - sooner when it failed twice in a row before the training began, both times with a line that begins with `error: `:
#     that is how megakrause refuses what a person must mend, such as a missing corpus. Once is not enough, for a dying
#     process may still hold the output folder. Whoever begins to train writes OUTPUT/config.toml anew.
# A config that cannot be read or is wrong is refused before anything is launched.
# SIGTERM, SIGINT, SIGHUP and SIGUSR1 end the launcher and everything it started, and nothing is started again. A run
# that trains saves first, within SAVE_SECONDS. When it has, and when it has ended by itself because its time limit is
# over, the exit status is 75: the same command goes on. Else it is 128 + the signal.
#
#   RETRIES=10         how often to start again without a new checkpoint
#   RETRY_SECONDS=30   pause before that
#   SAVE_SECONDS=120   what torchrun gives its processes after SIGTERM (deepspeed: 30)
#   GRACE_SECONDS=30   what processes that outlive their launcher get between SIGTERM and SIGKILL

RETRIES=${RETRIES:-10} RETRY_SECONDS=${RETRY_SECONDS:-30} GRACE_SECONDS=${GRACE_SECONDS:-30}
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${SAVE_SECONDS:-120}

say() { echo "${0##*/}: $*" >&2; }

die() {
    echo "error: $*" >&2
    exit 1
}

need() { command -v "$1" >/dev/null || die "$1 is not on PATH; source .venv/bin/activate first"; }

# read_config CONFIG.toml [key=value ...]: sets checkpoints and output, where they are, and steps and gpus; or ends the
# script with the config's error line.
# shellcheck disable=SC2034  # the scripts that source this read them
read_config() {
    [ $# -gt 0 ] || die "no config; usage: ${0##*/} CONFIG.toml [key=value ...]"
    local facts
    facts=$(python3 - "$@" <<'END'
import sys

import torch

from megakrause.config.file import load_config
from megakrause.errors import run_command


def main():
    config = load_config(sys.argv[1], sys.argv[2:])
    print(config.train.steps, torch.cuda.device_count())
    print(config.output)
    print(config.checkpoint.folder or f"{config.output}/checkpoints")


sys.exit(run_command(main))
END
    ) || exit 1
    { read -r steps gpus && read -r output && read -r checkpoints; } <<<"$facts"
}

# The step of the newest checkpoint; 0: none.
newest_step() {
    local step newest=0
    if [[ $checkpoints == *://* ]]; then
        step=$(megakrause checkpoint list "$checkpoints" 2>/dev/null | awk 'NR == 2 { print $1 }' | tr -d ,)
        echo "${step:-0}"
        return
    fi
    for step in "$checkpoints"/step-*; do
        step=${step##*/step-}
        case $step in '' | *[!0-9]*) continue ;; esac
        [ "$step" -le "$newest" ] || newest=$step
    done
    echo "$newest"
}

# Another one after each begin of the training.
begin() { stat -c %i-%y "$output/config.toml" 2>/dev/null || true; }

# Whether a launcher that ended with 0 has done its work; deepspeed.sh knows better.
finished() { true; }

retry() {
    local failures=0 refusals=0 step begun status
    errors=$(mktemp)
    trap 'rm -f "$errors"' EXIT
    trap 'stop TERM 143' TERM
    trap 'stop TERM 129' HUP
    trap 'stop USR1 138' USR1
    trap 'stop INT 130' INT
    while :; do
        step=$(newest_step) begun=$(begin) status=0
        attempt "$@" || status=$?
        ! grep -qE '^([^ ]+: )?stopped: ' "$errors" || exit 75
        [ -z "$stopped" ] || exit "$stopped"
        if [ "$status" = 0 ]; then
            finished && exit 0
            status=1
        fi
        if [ "$(newest_step)" -gt "$step" ]; then failures=1; else failures=$((failures + 1)); fi
        if [ "$(begin)" = "$begun" ] && grep -qE '^([^ ]+: )?error: ' "$errors"; then
            refusals=$((refusals + 1))
        else
            refusals=0
        fi
        if [ "$refusals" -ge 2 ] || [ "$failures" -gt "$RETRIES" ]; then
            say "given up: $failures failures in a row, the newest checkpoint is of step $(newest_step)"
            exit "$status"
        fi
        say "failed, the newest checkpoint is of step $(newest_step); start $failures of $RETRIES in $RETRY_SECONDS s"
        run sleep "$RETRY_SECONDS" || true
        [ -z "$stopped" ] || exit "$stopped"
    done
}

# attempt COMMAND...: runs it and returns its exit status. What it writes to standard error is in $errors, too.
attempt() {
    local status=0 copy tee mark=MEGAKRAUSE_ATTEMPT=$$-$RANDOM-$SECONDS
    # The copy ends when nobody is left to write, and not before.
    exec {copy}> >(trap '' TERM INT HUP USR1 && exec tee "$errors" >&2)
    tee=$!
    # Whatever it starts has the mark in its environment; torchrun's workers are in sessions of their own.
    run env "$mark" "$@" 2>&"$copy" || status=$?
    end_survivors "$mark"
    exec {copy}>&-
    wait "$tee" || true
    return "$status"
}

stopped='' child=''

# run COMMAND...: as the command alone, but in a process group of its own, to which `stop` hands on signals.
run() {
    local status=0
    set -m
    "$@" </dev/null &
    child=$!
    set +m
    [ -z "$stopped" ] || kill -TERM -- "-$child" 2>/dev/null || true
    wait "$child" || status=$?
    while kill -0 "$child" 2>/dev/null; do # a signal ended the wait alone
        status=0
        wait "$child" || status=$?
    done
    child=''
    return "$status"
}

# stop SIGNAL STATUS: ends what runs, and then this script with that status.
stop() {
    stopped=$2
    [ -z "$child" ] || kill -s "$1" -- "-$child" 2>/dev/null || true
}

# end_survivors NAME=value: ends the processes that have it in their environment.
end_survivors() {
    local signal pids deadline
    for signal in TERM KILL; do
        pids=$(survivors "$1") deadline=$((SECONDS + GRACE_SECONDS))
        # shellcheck disable=SC2086
        [ -z "$pids" ] || kill -s "$signal" $pids 2>/dev/null || true
        while [ -n "$(survivors "$1")" ] && [ "$SECONDS" -lt "$deadline" ]; do sleep 0.2; done
    done
}

survivors() { grep -lzxs "$1" /proc/[0-9]*/environ | cut -d / -f 3 || true; }
