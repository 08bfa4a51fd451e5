"""Does knowing where a fact is stored help a language model forget it? Localized unlearning, as notebooks and a package.

Modules:

- `unloc.arguments`: Refuse, in one line, what is not of the kind that a function's signature names
- `unloc.asking`: Ask a question behind answered ones, or many times
- `unloc.change`: What a method did to a model, as something that can be applied in part, taken back, stored and compared
- `unloc.checkpoints`: Real models: what one holds and needs, loading it, saving it whole, and keeping only what a region changed
- `unloc.cli`: The `unloc` command: plan a profile, run its notebooks, show progress, list what there is
- `unloc.comparison`: Set two arms side by side, pair by pair, in every group of a table
- `unloc.evaluation`: Run a model over facts: one teacher-forced pass for what it knows, greedy answers for what it says, and the whole judgement of a checkpoint
- `unloc.facts`: What a model is taught and then asked to forget: a seeded world of invented authors, TOFU itself, or data of your own
- `unloc.figures`: One look for all figures, and figures and tables saved with the data behind them
- `unloc.identity`: What a run was computed by: the pages it depends on and the methods it uses, the package's and a user's alike
- `unloc.inside`: Read what leaves each layer while a model predicts the answers, and run a model with other states in its middle
- `unloc.level`: Bring models to one level of forgetting, or of retention, before they are compared
- `unloc.many`: Ask many models that differ in the columns of a region, in one pass through what they share
- `unloc.many_descents`: Train many regions of one model at once, each as if it were alone
- `unloc.masked`: Train a chosen set of value vectors, of single weights, or of whole neurons and heads; hold every other weight to the bit
- `unloc.measuring`: Time and memory of ways to do one thing, turn by turn, with the table and the figure of them
- `unloc.methods.depth`: Measure how far down a fact is gone, by patching the unlearned model's states into the original
- `unloc.methods.few_shot`: Answer other questions before the one that is asked
- `unloc.methods.forget_quality`: Whether an unlearned model and the retained model can be told apart by their truth ratios
- `unloc.methods.logit_lens`: Read every layer as if it were the last
- `unloc.methods.memorization`: How many answer tokens a model predicts, and how likely it makes them
- `unloc.methods.model_utility`: What else a model still knows: retain facts, real authors, the world
- `unloc.methods.probing`: Tell true from false answers by what leaves each layer, linearly
- `unloc.methods.relearning`: Teach a model a little, and measure which forgotten facts come back that it was not taught
- `unloc.methods.rephrasing`: Put the question in other words
- `unloc.methods.restore`: Take a region back to the retained model: the exact solution, where the facts were injected through it
- `unloc.methods.rounding`: Round the weights, and measure whether the forgetting was smaller than a step of the grid
- `unloc.methods.sampling`: Ask many times, and keep the best answer
- `unloc.methods.strength`: How much of the forget set cannot be extracted any more, and how much of the retain set still can
- `unloc.methods.zeroing`: Shrink the value vectors of a region, or remove them
- `unloc.metrics`: What a model still holds of its facts, and what it is worth: extraction strength, memorization, probability, ROUGE-L, truth ratio, forget quality, model utility and membership
- `unloc.models`: Tiny models to experiment on, the value vectors inside a checkpoint of any common architecture, and what a model says at the answer
- `unloc.objectives`: The losses of unlearning and of keeping, as pure functions of log-probabilities, logits and hidden states
- `unloc.plan`: What a profile would run, what it needs, and whether it fits this machine, before anything is loaded
- `unloc.profiles`: Read the profiles of a project: which values a study has, and of which types
- `unloc.project`: Where work lies: a checkout of unloc, or a small folder of your own beside an installed package
- `unloc.quantization`: Round a model's weights for the length of a block, by a simulation that runs anywhere or by a library's own kernels
- `unloc.regions`: Name a set of value vectors of a model, or of single weights, and compare such sets
- `unloc.register`: A method says what it is where it is defined: its label, its options, its source, and what it costs
- `unloc.relearn`: Teach a model a little, follow what comes back beside, and summarise the curve
- `unloc.runs`: A run is its description: where it lives, that it is whole, and how many are done at once
- `unloc.scene`: What an attack gets: the attacked model, the two that it is compared with, and what each knows of the facts
- `unloc.settings`: Typed groups of settings: what a profile may say, and one clear line for what it may not
- `unloc.statistics`: Say whether two arms differ, whether they are equal for practical purposes, or whether the experiment was too small to tell
- `unloc.steps.edit`: Change an original model by an editor: solved where unlearning descends
- `unloc.streaming`: Pass coefficients and gradients of every layer to a localizer, one layer at a time
- `unloc.study`: From the name of a profile to runs, and from runs to one tidy table
- `unloc.tokens`: From questions and answers to padded batches that know which tokens are the answer
- `unloc.tradeoff`: One number for a whole unlearning run: the area under its trade-off curve, or forget quality at a fixed loss of utility
- `unloc.training`: Fine-tune, inject, unlearn, supervise: four short descents on one loop, and the judgement of the model along the way
- `unloc.transport`: Finished runs in one file: packed where they were computed, unpacked where they are read
- `unloc.ways`: The ways to take a training step, or to pass over facts, whose costs are compared"""

__version__ = "0.1.0"
