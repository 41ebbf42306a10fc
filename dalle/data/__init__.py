"""Image-text data: the emoji set, WebDataset-style shards, folders of captioned images, and the paper's augmentations."""
