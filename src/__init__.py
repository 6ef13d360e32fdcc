"""thaw: fine-tune an ImageNet VGG16 by thawing it in stages."""
