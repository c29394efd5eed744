"""Memory, time and accuracy of GLASS with a ViT (paper: ViT-B/16, K = 1 to 16 crops, 25 epochs each).

    python -m num_crops.num_crops_vit [--preset demo] [--quick] [--crop-counts 1 4 16]

Hardware: one CUDA GPU and many CPU cores (hours: docs/hours.md); with --preset demo, minutes on two CPU cores.
Output: results/<preset>/num_crops/glass_vit/<full or quick>/k_<K>/costs.csv; fitted lines printed.
"""

if __name__ == "__main__":
    from num_crops.sweep import main

    main("glass_vit", __doc__)
