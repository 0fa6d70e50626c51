"""The commands of `mmjax`, one module each: `configure(parser)` adds arguments, `run(options)` does the work.

Modules here import nothing heavy at the top, so that help and usage errors come at once.
"""

# What `mmjax --help` says about each; the module of a command has its name, eval's is evaluate.
COMMANDS: dict[str, str] = {
    "train": "run an experiment file, or resume it",
    "eval": "measure a model: zero-shot accuracy, linear probe, retrieval",
    "plan": "say what an experiment needs on a mesh of chips, without running it",
    "zeroshot": "classify images by labels given in words",
    "embed": "write embeddings of images and texts to a file",
    "generate": "let a language model go on with a text",
    "chat": "talk to a chat model",
    "convert": "read a model folder and write it again, in another dtype or shard size",
    "info": "show a model folder's modules, parameters and bytes",
}
