"""Search the hyperparameters of a standard model with a ViT (paper: ViT-B/16, 50 trials of up to 25 epochs).

    python -m hyperparameter_tuning.standard_vit_tuning [--preset demo] [--trials N] [--epochs N]

Hardware: one CUDA GPU and many CPU cores (hours: docs/hours.md); with --preset demo, minutes on two CPU cores.
Output: results/<preset>/tuning/standard_vit/study.db, and the best values printed, to be copied to config.py.
"""

if __name__ == "__main__":
    from hyperparameter_tuning.study import main

    main("standard_vit", __doc__)
