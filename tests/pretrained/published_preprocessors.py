"""preprocessor_config.json of models on the Hugging Face hub, and pretrained_cfg of timm 1.0.31.

The files of ViT (first version), BEiT, CLIP, DINOv2 and SigLIP were compared with copies that other
public sources quote. The files of DeiT, BiT, ConvNeXT and MAE were not.
"""

HALF = {'image_mean': [0.5, 0.5, 0.5], 'image_std': [0.5, 0.5, 0.5]}
IMAGENET = {'image_mean': [0.485, 0.456, 0.406], 'image_std': [0.229, 0.224, 0.225]}
CLIP = {
  'image_mean': [0.48145466, 0.4578275, 0.40821073],
  'image_std': [0.26862954, 0.26130258, 0.27577711],
}
ON = {'do_normalize': True, 'do_resize': True}
DINOV2 = ON | IMAGENET | {
  'crop_size': {'height': 224, 'width': 224},
  'do_center_crop': True,
  'do_convert_rgb': True,
  'do_rescale': True,
  'image_processor_type': 'BitImageProcessor',
  'resample': 3,
  'rescale_factor': 0.00392156862745098,
  'size': {'shortest_edge': 256},
}  # fmt: skip
# Repository on the hub -> its preprocessor_config.json.
HUGGING_FACE = {
  'google/vit-base-patch16-224': ON
  | HALF
  | {
    'do_rescale': True,
    'image_processor_type': 'ViTImageProcessor',
    'resample': 2,
    'rescale_factor': 0.00392156862745098,
    'size': {'height': 224, 'width': 224},
  },
  'google/vit-base-patch16-224-in21k, first version': ON
  | HALF
  | {'feature_extractor_type': 'ViTFeatureExtractor', 'resample': 2, 'size': 224},
  'facebook/deit-base-patch16-224': ON
  | IMAGENET
  | {
    'crop_size': 224,
    'do_center_crop': True,
    'feature_extractor_type': 'DeiTFeatureExtractor',
    'resample': 3,
    'size': 256,
  },
  'facebook/dinov2-base': DINOV2,
  'facebook/dinov2-with-registers-base': DINOV2,
  'google/bit-50': ON
  | HALF
  | {
    'crop_size': {'height': 448, 'width': 448},
    'do_center_crop': True,
    'do_convert_rgb': True,
    'do_rescale': True,
    'image_processor_type': 'BitImageProcessor',
    'resample': 2,
    'rescale_factor': 0.00392156862745098,
    'size': {'shortest_edge': 448},
  },
  'openai/clip-vit-base-patch32': ON
  | CLIP
  | {
    'crop_size': 224,
    'do_center_crop': True,
    'feature_extractor_type': 'CLIPFeatureExtractor',
    'resample': 3,
    'size': 224,
  },
  'google/siglip-base-patch16-224': ON
  | HALF
  | {
    'do_rescale': True,
    'image_processor_type': 'SiglipImageProcessor',
    'processor_class': 'SiglipProcessor',
    'resample': 3,
    'rescale_factor': 0.00392156862745098,
    'size': {'height': 224, 'width': 224},
  },
  'facebook/convnext-tiny-224': ON
  | IMAGENET
  | {
    'crop_pct': 0.875,
    'feature_extractor_type': 'ConvNextFeatureExtractor',
    'resample': 3,
    'size': 224,
  },
  'facebook/convnext-base-384': ON
  | IMAGENET
  | {
    'crop_pct': 0.875,
    'feature_extractor_type': 'ConvNextFeatureExtractor',
    'resample': 3,
    'size': 384,
  },
  'microsoft/beit-base-patch16-224': ON
  | HALF
  | {
    'crop_size': 224,
    'do_center_crop': False,
    'feature_extractor_type': 'BeitFeatureExtractor',
    'resample': 2,
    'size': 224,
  },
  'facebook/vit-mae-base': ON
  | IMAGENET
  | {'feature_extractor_type': 'ViTFeatureExtractor', 'resample': 3, 'size': 224},
}
INCEPTION = {'mean': [0.5, 0.5, 0.5], 'std': [0.5, 0.5, 0.5]}
TORCH_IMAGENET = {'mean': [0.485, 0.456, 0.406], 'std': [0.229, 0.224, 0.225]}
# Model -> the fields of pretrained_cfg about images (timm 1.0.31), and variations of them.
TIMM = {
  'vit_base_patch16_224.augreg_in21k': INCEPTION
  | {
    'input_size': [3, 224, 224],
    'interpolation': 'bicubic',
    'crop_pct': 0.9,
    'crop_mode': 'center',
  },
  'vit_base_patch16_384.augreg_in21k_ft_in1k': INCEPTION
  | {
    'input_size': [3, 384, 384],
    'interpolation': 'bicubic',
    'crop_pct': 1.0,
    'crop_mode': 'center',
  },
  'deit3_base_patch16_224.fb_in1k': TORCH_IMAGENET
  | {
    'input_size': [3, 224, 224],
    'interpolation': 'bicubic',
    'crop_pct': 0.9,
    'crop_mode': 'center',
  },
  'vit_small_patch14_dinov2.lvd142m': TORCH_IMAGENET
  | {
    'input_size': [3, 518, 518],
    'interpolation': 'bicubic',
    'crop_pct': 1.0,
    'crop_mode': 'center',
  },
  'squash': TORCH_IMAGENET
  | {
    'input_size': [3, 224, 224],
    'interpolation': 'bilinear',
    'crop_pct': 0.9,
    'crop_mode': 'squash',
  },
  'squash without a crop': TORCH_IMAGENET
  | {
    'input_size': [3, 224, 160],
    'interpolation': 'lanczos',
    'crop_pct': 1.0,
    'crop_mode': 'squash',
  },
  'border': TORCH_IMAGENET
  | {
    'input_size': [3, 224, 224],
    'interpolation': 'bicubic',
    'crop_pct': 0.9,
    'crop_mode': 'border',
  },
  'border without a crop': TORCH_IMAGENET
  | {
    'input_size': [3, 224, 224],
    'interpolation': 'bicubic',
    'crop_pct': 1.0,
    'crop_mode': 'border',
  },
  'center of a rectangle': TORCH_IMAGENET
  | {
    'input_size': [3, 224, 320],
    'interpolation': 'bicubic',
    'crop_pct': 0.875,
    'crop_mode': 'center',
  },
  'padded': TORCH_IMAGENET
  | {
    'input_size': [3, 225, 225],
    'interpolation': 'bilinear',
    'crop_pct': 1.2,
    'crop_mode': 'center',
  },
}
