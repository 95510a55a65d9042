"""In-context learning, theory beside experiment: closed forms, trained one-layer transformers, and their comparison.

A prompt shows a model N labelled examples of a task that it has never seen, and a query. For one layer of linear
attention what training converges to, how fast, and how far it stays from Bayes is known in closed form.

    checks         what is refused, and how
    mixture        the classification task: Gaussian classes with one covariance (`Mixture`)
    tasks/         what a model reads: raw prompts, or their sufficient statistics; shifts; regression; pools of tasks
    models/        linear self-attention in full and reduced form, deeper ones, softmax and ReLU, a small transformer
    theory/        predictions: NumPy float64 in and out, no training inside
    estimators/    what a statistician would do with a prompt: least squares, ridge, Lasso, plug-in, mixtures
    sweep, training    many runs in one compiled program
    claims/        each function trains or samples, predicts, and returns both as rows of `Comparison`
"""
