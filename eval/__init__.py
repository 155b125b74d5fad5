"""Evaluation: speak, hear, score, report. Import as `from eval.metrics import score_clip`.

A bare `import eval` shadows the builtin of that name; nothing is exported here so that nobody needs
to. How the modules hang together, each using those above it:

    languages, normalize, protocols     what a language is, and its text as it is compared
    stats, metrics, acoustics           one clip's score, intervals over many, the waveform
    work, pace, lines                   ledgers, locks and caches; speeds; commands that talk JSON
    public_sets -> sets                 what is spoken, and with which prompt
    espeak, command -> systems          who speaks
    asr_greedy -> asr_whisper, asr_mms, asr_worker -> asr       who hears
    speaker_wavlm -> speaker            whose voice it is
    stages, hear, voices                the work on each clip: a JSONL file each, resumable, shared
    runs, paired, anchors               finished runs, and two of them clip beside clip
    table, report, clips -> page        what was found: on the terminal, in report.html
    plan -> run                         python -m eval.run
    compare_page -> compare             python -m eval.compare
    bench_hear                          how fast clips are heard
"""
