"""nepa probe: what simple classifiers read from every layer of a run, beside the same network untrained.

Features are computed without augmentation and with the attention the run was trained with, unless `causal=` says
otherwise; they are kept in features/ beside probe.json and found again by the next probe. Every layer and pooling
(mean over the tokens, last token, BOS, attentive) is read by every classifier:

  linear  logistic regression by L-BFGS on standardised features
  knn     20 nearest neighbours by cosine, as DINO weighs them
  lars    the linear-probe protocol of MAE

Where "label" holds float numbers, linear is a ridge regression and knn the mean over the neighbours, and the figures
are R2 instead of accuracies; there is no lars and no attentive row.

An attentive row is a learned pooling trained together with its linear layer, and stands in the column "linear". The
best row is the one the first classifier reads best on a fifth of the training samples held back, never on the test
samples. Standardised features hide collapse, so the effective rank stands beside the accuracies.

It ends with a verdict: the best row beside the best of random weights and of the raw tokens, each with the classifier
that read held-back training samples best, and 95 % intervals of the differences, paired over the test samples. Where
these are fewer than the split has, they are drawn from all of it, the same ones in every run.

Where tokens have classes of their own ("target" [N]; of scenes the class that most pixels of a patch have), a row reads
single tokens of a layer, without pooling, beside the share of the most frequent class; the samples that are counted are
tokens, 16 of each image or sequence.

The rows "last embedding" and "average embedding" are the paper's linear probe: the output of the final norm, at the
last token and as the mean over the tokens, of the frozen network. They are named so where the network has been
pre-trained with causal attention, and no more, and is read with it. The paper gives 11.3 % and 14.1 % for them
(ImageNet-1k); all training samples there:
`nepa probe RUN layers=final poolings=last,mean classifiers=lars train_samples=1300000 test_samples=50000`.

`beside=` adds other networks, read on the same samples in the same way, each with a row of its own in the verdict. A
model of timm (`beside=timm:vit_small_patch16_dinov3.lvd1689m`; `timm:NAME@FILE.safetensors` takes its weights from a
file, `pretrained=false` leaves it random) reads the stored images as its own data config says, and has as rows the mean
over the places and the CLS token of every layer, of the final norm, and the pooled features that its classifier reads.
A function of yours (`beside=my_lab:features`) is given every batch without its labels and returns features [B, D], or a
dictionary of several such rows; it serves any kind of data.

A run takes changes to its data (`data.root=DIR`) and to train.workers. A recipe with `init=` gives the data of the
recipe and the weights of a run, of a folder in the released layout, or of a hub name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nepa_core.basics import UserError
from nepa_core.runtime.distributed import world
from nepa_core.runtime.locks import at_work
from nepa_core.runtime.run import Run, is_run, refuse_holder
from recipes.readout.probing import FREE, check_free, probe, render, subject
from recipes.readout.probing import ProbeOptions as Options
from recipes.report.provenance import provenance
from recipes.resolve import default_out
from recipes.training.train import say_leaks


def main(target: str, options: Options, changes: dict[str, Any]) -> None:
    check_free("probe", changes, FREE)
    if options.init is None and not is_run(target):
        refuse_holder(target)
        raise UserError(
            f"{target} is not a run folder; run `nepa pretrain` first and name its folder, or give a recipe init="
        )
    run = Run(Path(options.out or (target if is_run(target) else default_out(target, "probe"))))
    with world() as ranks, at_work(run, ranks, trains=False):
        config, model, tuned = subject(target, options.init, changes, ranks.device)
        if ranks.is_main:
            say_leaks(config.data)
        summary = probe(config, model, options, tuned=tuned, store=run.path / "features", ranks=ranks, show=True)
        if ranks.is_main:
            summary |= {"made_with": provenance()}
            run.write_summary(summary, "probe.json")
            print(render(summary))
