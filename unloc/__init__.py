"""Does knowing where a fact is stored help a language model forget it? Localized unlearning, as notebooks and a package.

Modules:

- `unloc.arguments`: Refuse, in one line, what is not of the kind that a function's signature names
- `unloc.attacks`: Try to get back what a model was made to forget: by teaching, rounding, looking inside and asking otherwise
- `unloc.checkpoints`: Real models: what one holds and needs, loading it, saving it whole, and keeping only what a region changed
- `unloc.cli`: The `unloc` command: plan a profile, run its notebooks, show progress, list what there is
- `unloc.comparison`: Set two arms side by side, pair by pair, in every group of a table
- `unloc.evaluation`: Run a model over facts: one teacher-forced pass for what it knows, greedy answers for what it says, and the whole judgement of a checkpoint
- `unloc.facts`: What a model is taught and then asked to forget: a seeded world of invented authors, TOFU itself, or data of your own
- `unloc.figures`: One look for all figures, and figures and tables saved with the data behind them
- `unloc.identity`: What a run was computed by: the pages it depends on and the methods it uses, the package's and a user's alike
- `unloc.many`: Train many regions of one model at once, each as if it were alone
- `unloc.masked`: Train a chosen set of value vectors, of single weights, or of whole neurons and heads; hold every other weight to the bit
- `unloc.metrics`: What a model still holds of its facts, and what it is worth: extraction strength, memorization, probability, ROUGE-L, truth ratio, forget quality, model utility and membership
- `unloc.models`: Tiny models to experiment on, the value vectors inside a checkpoint of any common architecture, and what a model says at the answer
- `unloc.objectives`: The losses of unlearning and of keeping, as pure functions of log-probabilities, logits and hidden states
- `unloc.plan`: What a profile would run, what it needs, and whether it fits this machine, before anything is loaded
- `unloc.profiles`: Read the profiles of a project: which values a study has, and of which types
- `unloc.project`: Where work lies: a checkout of unloc, or a small folder of your own beside an installed package
- `unloc.regions`: Name a set of value vectors of a model, or of single weights, and compare such sets
- `unloc.register`: A method says what it is where it is defined: its label, its options, its source, and what it costs
- `unloc.runs`: A run is its description: where it lives, that it is whole, and how many are done at once
- `unloc.settings`: Typed groups of settings: what a profile may say, and one clear line for what it may not
- `unloc.statistics`: Say whether two arms differ, whether they are equal for practical purposes, or whether the experiment was too small to tell
- `unloc.streaming`: Pass coefficients and gradients of every layer to a localizer, one layer at a time
- `unloc.study`: From the name of a profile to runs, and from runs to one tidy table
- `unloc.tokens`: From questions and answers to padded batches that know which tokens are the answer
- `unloc.tradeoff`: One number for a whole unlearning run: the area under its trade-off curve, or forget quality at a fixed loss of utility
- `unloc.training`: Fine-tune, inject, unlearn, supervise: four short descents on one loop, and the judgement of the model along the way
- `unloc.transport`: Finished runs in one file: packed where they were computed, unpacked where they are read"""

__version__ = "0.1.0"
