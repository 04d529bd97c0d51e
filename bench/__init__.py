"""The benchmark of fusedopt: ``python -m fusedopt.bench`` (sources in ``bench/``).

It answers two questions with one command, on the machine it runs on, and others when asked:

* *Is it the same optimizer?* ``train`` trains two small networks on real data with every optimizer,
  through torch.optim and through fusedopt side by side, and compares the loss curves.
* *Is it faster?* ``step`` times the bare optimizer step on named lists of parameter shapes, against
  torch's own steps and against the traffic floor, the time of moving the same bytes without maths.
* *And with what a training loop does around the step?* ``pipeline`` times unscaling, clipping,
  stepping, averaging and clearing, as torch's chain of passes and as fusedopt's one call.
* *Do others do the same work?* ``parity`` compares any optimizer with torch's in float64; ``list``
  says who can run here.
* *Who is faster, where, and by how much?* ``report`` makes a page with pictures of result files.

Modules, in the order data takes:

* ``optimizers``: which optimizers there are and the settings they run with;
* ``architectures`` and ``workloads``: named lists of parameter shapes;
* ``contestant``, ``peers`` and ``providers``: who can take a step: torch, other libraries,
  fusedopt, the traffic floor;
* ``parity``, ``memory`` and ``device``: whether it is the same arithmetic, and what a step takes
  beside time;
* ``timing``: a round-robin race between steps, medians, per-round ratios;
* ``train``, ``step`` and ``pipeline``: the jobs, generators that yield a row once it is measured;
* ``machine``: what a figure is worth nothing without: processor, threads, versions, date;
* ``report``, ``tables`` and ``picture``: tables, the JSON file, the pictures of two jobs;
* ``results``, ``charts``, ``page`` and ``documents``: result files, read and shown;
* ``check`` and ``showing``: the jobs ``parity`` and ``list``, and ``report``;
* ``options``, ``session`` and ``__main__``: the command line and one run of it.
"""
