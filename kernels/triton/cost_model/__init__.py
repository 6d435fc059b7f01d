"""The static model that the tables of tiles are made with: cost.py, and what the makers say of their GPUs: gpus.py."""
