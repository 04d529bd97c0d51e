"""The benchmark of fusedopt: ``python -m fusedopt.bench`` (sources in ``bench/``).

It answers two questions with one command, on the machine it runs on, and others when asked:

* *Is it the same optimizer?* ``train`` trains two small networks on real data with every optimizer,
  through torch.optim and through fusedopt side by side, and compares the loss curves.
* *Is it faster?* ``step`` times the bare optimizer step on named lists of parameter shapes, against
  torch's own steps and against the traffic floor, the time of moving the same bytes without maths.
* *And with what a training loop does around the step?* ``pipeline`` times unscaling, clipping,
  stepping, averaging and clearing, as torch's chain of passes and as fusedopt's one call.
* ``load`` times what feeds a loop; ``parity`` compares any optimizer with torch's in float64;
  ``list`` says who can run here; ``report`` makes a page with pictures of result files.

A job yields `rows`, one a measurement; ``tables``, ``plots`` and ``report`` show them. What a job
needs: ``optimizers`` and their settings, ``workloads`` (shapes), ``providers`` (who takes a step),
the ``floor``, and ``timing``, the round-robin race between steps.
"""
