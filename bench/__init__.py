"""The benchmark of fusedopt: ``python -m fusedopt.bench`` (sources in ``bench/``).

It answers two questions with one command, on the machine it runs on, and a third when asked:

* *Is it the same optimizer?* ``train`` trains two small networks on real data with every optimizer,
  through torch.optim and through fusedopt side by side, and compares the loss curves.
* *Is it faster?* ``step`` times the bare optimizer step on named lists of parameter shapes, against
  torch's own steps and against the traffic floor, the time of moving the same bytes without maths.
* *And with what a training loop does around the step?* ``pipeline`` times unscaling, clipping,
  stepping, averaging and clearing, as torch's chain of passes and as fusedopt's one call.

Modules, in the order data takes:

* ``optimizers``: which optimizers there are and the settings they run with;
* ``workloads``: named lists of parameter shapes;
* ``providers``: who can take a step: torch default, foreach and fused, fusedopt, the traffic floor;
* ``timing``: a round-robin race between steps, medians, per-round ratios;
* ``train``, ``step`` and ``pipeline``: the jobs, generators that yield a row once it is measured;
* ``machine``: what a figure is worth nothing without: processor, threads, versions, date;
* ``report`` and ``picture``: tables, the JSON file, the pictures;
* ``__main__``: the command line.
"""
