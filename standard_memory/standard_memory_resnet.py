"""Memory, time and accuracy of standard transfer learning with a ResNet (paper: ResNet-50, batch 32, 25 epochs).

    python -m standard_memory.standard_memory_resnet [--preset demo] [--quick]

Hardware: one CUDA GPU and many CPU cores (hours: docs/hours.md); with --preset demo, minutes on two CPU cores.
Output: results/<preset>/standard_memory/standard_resnet/<full or quick>/costs.csv.
"""

if __name__ == "__main__":
    from standard_memory.profile import main

    main("standard_resnet", __doc__)
