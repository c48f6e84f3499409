#!/usr/bin/env bash
# Does training rubric and preference samples one kind after the other make the policy forget, and training both in the same batches
# not? PPO from the quickstart's run after SFT, three arms, three seeds, measured on held-out prompts about real clips.
# Meant for ten minutes; not timed yet.
#
#   bash examples/studies/joint_vs_sequential.sh [RUN] [key=value ...]
#
# Needs the quickstart to have run; RUN is the run to start from (default runs/quickstart/sft). A program judges in training; with
# rl.judge.run=runs/quickstart/reward a reward model does. Writes runs/studies/joint-vs-sequential: results.json and report.html.
# Safe to interrupt and run again: arms that are finished are kept.
set -euo pipefail
cd "$(dirname "$0")/../.."
source examples/studies/study.sh
study joint-vs-sequential "$@"
