"""Overrides of the preset ``smoke`` with which a step of a pipeline takes a second or two."""

TINY = [
    "model.backbone_args.depth=1",
    "model.backbone_args.embed_dim=32",
    "model.backbone_args.num_heads=2",
    "model.hidden=8",
    "optim.epochs=1",
]
