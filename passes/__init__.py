"""The passes, in the order in which the pipeline runs them.

1. ``prepare``     functions inlined, opset settled, dimensions fixed, shapes inferred, constants lifted, ties made,
                   the file's own Identity nodes removed, terminal identities appended to outputs that need one
   ``opset``       the part of it that onnx's version converter leaves undone
   ``train_mode``, ``mixed_precision``  the same graph in training form, and in a narrower type, if asked
2. ``levels``      analysis: a level for each vertex and leaf; where the slack is
3. ``parameters``  analysis: which leaves are trained, and why the others are not
4. ``placement``   analysis: levels at which the fewest identities are needed, if asked for
   ``identities``  identity vertices until every edge spans one level
5. ``dynamics``    the equations of one inference step, as terms
6. ``wavefront``   the same equations, specialised: what is left of them at each step
   ``literal``     the same equations as they stand, in a Loop: the reference, inference learning, the ablations
   ``tracing``     what the literal loop says of each step, if asked
   ``reverse``     plain reverse mode, the yardstick, which shares only rules, order of sums and clean-up
7. ``training``    terms, losses and optimizers as ONNX nodes around the forward graph
   ``fold_batch_norm``  before them and after them: BatchNormalizations of running statistics into Convs
8. ``spell_out``, ``forward_forms``  operators of the forward part in forms that runtimes have, or run faster
   ``simplify``    what emission leaves behind
   ``layouts``     in which order the axes of values lie, where lowerings want another than the model's
9. ``recompute``   predictions computed again to fit a memory budget, if asked: ``liveness`` counts, ``rerun`` writes

``contracts`` holds the predicates that passes require and ensure.  Nothing is re-exported here.
"""
