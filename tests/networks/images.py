"""Images: convolutional networks, vision transformers with windows and hierarchies, segmentation, detection."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.networks.common import BATCH, LABELS, WORDS, Network, hugging, pixels, words

PLAIN: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48, "image_size": 32,
    "patch_size": 8, "num_labels": LABELS,
}  # fmt: skip


def _classifier(kind: str, name: str, size: int = 32, head: str = "ForImageClassification", **settings: Any) -> Network:
    return hugging(
        kind, f"{name}Config", f"{name}{head}", pixels(size), loss="cross-entropy", num_labels=LABELS, **settings
    )


def _image_and_words(rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {**words(rng), **pixels()(rng)}


CLIP_PARTS: dict[str, Any] = {
    "text_config": {"vocab_size": WORDS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
                    "intermediate_size": 48, "max_position_embeddings": 16, "eos_token_id": 2, "bos_token_id": 0,
                    "pad_token_id": 1},
    "vision_config": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
                      "image_size": 32, "patch_size": 8},
}  # fmt: skip
RESNET: dict[str, Any] = {"embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 1], "layer_type": "basic"}
WINDOWS, CONVOLUTIONS, SEGMENTATION = "vision transformer, hierarchical", "convolutional", "segmentation"

NETWORKS: dict[str, Network] = {
    "vit": hugging("vision transformer", "ViTConfig", "ViTForImageClassification", pixels(), loss="cross-entropy",
                   **PLAIN),
    "deit": hugging("vision transformer", "DeiTConfig", "DeiTForImageClassification", pixels(), loss="cross-entropy",
                    **PLAIN),
    "dinov2": hugging("vision transformer", "Dinov2Config", "Dinov2ForImageClassification", pixels(),
                      loss="cross-entropy", mlp_ratio=2, **PLAIN),
    "beit": hugging("vision transformer", "BeitConfig", "BeitForImageClassification", pixels(), loss="cross-entropy",
                    use_relative_position_bias=True, layer_scale_init_value=0.1, **PLAIN),
    "ijepa": hugging("vision transformer", "IJepaConfig", "IJepaForImageClassification", pixels(),
                     loss="cross-entropy", **PLAIN),
    "vitmae": hugging("vision transformer", "ViTMAEConfig", "ViTMAEModel",
                      lambda rng: {**pixels()(rng), "noise": rng.random((BATCH, 16)).astype(np.float32)},
                      "last_hidden_state", **{k: v for k, v in PLAIN.items() if k != "num_labels"}),
    "videomae": hugging("vision transformer", "VideoMAEConfig", "VideoMAEForVideoClassification",
                        lambda rng: {"pixel_values": rng.standard_normal((BATCH, 4, 3, 16, 16)).astype(np.float32)},
                        loss="cross-entropy", **{**PLAIN, "image_size": 16}, num_frames=4, tubelet_size=2),
    "timesformer": hugging("vision transformer", "TimesformerConfig", "TimesformerForVideoClassification",
                           lambda rng: {"pixel_values": rng.standard_normal((BATCH, 2, 3, 16, 16)).astype(np.float32)},
                           loss="cross-entropy", **{**PLAIN, "image_size": 16}, num_frames=2),
    "swin": _classifier(WINDOWS, "Swin", image_size=32, patch_size=2, embed_dim=8, depths=[2, 2], num_heads=[1, 2],
                        window_size=4),
    "swinv2": _classifier(WINDOWS, "Swinv2", image_size=32, patch_size=2, embed_dim=8, depths=[2, 2], num_heads=[1, 2],
                          window_size=4),
    "segformer-class": _classifier(WINDOWS, "Segformer", num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1],
                                   hidden_sizes=[8, 16], patch_sizes=[7, 3], strides=[4, 2],
                                   num_attention_heads=[1, 2], mlp_ratios=[2, 2]),
    "pvt": _classifier(WINDOWS, "Pvt", image_size=32, depths=[1, 1, 1, 1], hidden_sizes=[8, 8, 16, 16],
                       num_attention_heads=[1, 1, 2, 2], mlp_ratios=[2, 2, 2, 2]),
    "pvt-v2": _classifier(WINDOWS, "PvtV2", image_size=32, depths=[1, 1, 1, 1], hidden_sizes=[8, 8, 16, 16],
                          num_attention_heads=[1, 1, 2, 2], mlp_ratios=[2, 2, 2, 2]),
    "cvt": _classifier(WINDOWS, "Cvt", embed_dim=[8, 16], depth=[1, 2], num_heads=[1, 2], num_stages=2,
                       patch_sizes=[7, 3], patch_stride=[4, 2], patch_padding=[2, 1], mlp_ratio=[2.0, 2.0],
                       attention_drop_rate=[0.0, 0.0], drop_rate=[0.0, 0.0], drop_path_rate=[0.0, 0.0],
                       qkv_bias=[True, True], cls_token=[False, True], qkv_projection_method=["dw_bn", "dw_bn"],
                       kernel_qkv=[3, 3], padding_kv=[1, 1], stride_kv=[2, 2], padding_q=[1, 1], stride_q=[1, 1]),
    "levit": _classifier(WINDOWS, "Levit", size=32, image_size=32, hidden_sizes=[16, 24, 32],
                         num_attention_heads=[2, 2, 2], depths=[1, 1, 1], key_dim=[8, 8, 8], mlp_ratio=[2, 2, 2],
                         attention_ratio=[2, 2, 2]),
    "mobilevit": _classifier(WINDOWS, "MobileViT", size=32, image_size=32, hidden_sizes=[16, 16, 16],
                             neck_hidden_sizes=[8, 8, 8, 8, 8, 8, 16], num_attention_heads=2),
    "mobilevitv2": _classifier(WINDOWS, "MobileViTV2", size=64, image_size=64, width_multiplier=0.25),
    "hiera": _classifier(WINDOWS, "Hiera", size=32, image_size=[32, 32], embed_dim=8, num_heads=[1, 2], depths=[1, 1],
                         patch_size=[7, 7], patch_stride=[4, 4], patch_padding=[3, 3], num_query_pool=1,
                         masked_unit_size=[4, 4], masked_unit_attention=[True, False], embed_dim_multiplier=2.0,
                         query_stride=[2, 2]),
    "swiftformer": _classifier(WINDOWS, "SwiftFormer", size=64, image_size=64, depths=[1, 1, 1, 1],
                               embed_dims=[8, 8, 16, 16], mlp_ratio=2),
    "focalnet": _classifier(WINDOWS, "FocalNet", size=32, image_size=32, patch_size=4, embed_dim=8,
                            hidden_sizes=[8, 16], depths=[1, 1], focal_levels=[2, 2], focal_windows=[3, 3]),
    "poolformer": _classifier(
        WINDOWS, "PoolFormer", hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], mlp_ratio=2.0),
    "convnext": _classifier(CONVOLUTIONS, "ConvNext", hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1],
                            layer_scale_init_value=0.1),
    "convnextv2": _classifier(CONVOLUTIONS, "ConvNextV2", hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1]),
    "mobilenet-v1": _classifier(CONVOLUTIONS, "MobileNetV1", depth_multiplier=0.25, min_depth=4),
    "mobilenet-v2": _classifier(CONVOLUTIONS, "MobileNetV2", depth_multiplier=0.25, min_depth=4),
    "efficientnet": _classifier(CONVOLUTIONS, "EfficientNet", width_coefficient=0.2, depth_coefficient=0.3,
                                image_size=32, hidden_dim=256, dropout_rate=0.0),
    "resnet": _classifier(CONVOLUTIONS, "ResNet", **RESNET),
    "regnet": _classifier(CONVOLUTIONS, "RegNet", embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2],
                          groups_width=4, layer_type="y"),
    "bit": _classifier(CONVOLUTIONS, "Bit", embedding_size=8, hidden_sizes=[16, 32], depths=[1, 1], num_groups=4),
    "segformer": hugging(SEGMENTATION, "SegformerConfig", "SegformerForSemanticSegmentation", pixels(),
                         num_labels=LABELS, num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1],
                         hidden_sizes=[8, 16], patch_sizes=[7, 3], strides=[4, 2], num_attention_heads=[1, 2],
                         mlp_ratios=[2, 2], decoder_hidden_size=16),
    "upernet": hugging(SEGMENTATION, "UperNetConfig", "UperNetForSemanticSegmentation", pixels(64), num_labels=LABELS,
                       hidden_size=8, pool_scales=[1, 2], auxiliary_in_channels=12, auxiliary_channels=8,
                       use_auxiliary_head=False,
                       backbone_config={"model_type": "resnet", **RESNET, "out_features": ["stage1", "stage2"]}),
    "dpt": hugging(SEGMENTATION, "DPTConfig", "DPTForDepthEstimation", pixels(), "predicted_depth",
                   **{**PLAIN, "num_hidden_layers": 4}, backbone_out_indices=[0, 1, 2, 3],
                   neck_hidden_sizes=[8, 8, 16, 16], fusion_hidden_size=8, reassemble_factors=[4, 2, 1, 0.5]),
    "glpn": hugging(SEGMENTATION, "GLPNConfig", "GLPNForDepthEstimation", pixels(64), "predicted_depth",
                    depths=[1, 1, 1, 1], hidden_sizes=[8, 8, 16, 16], num_attention_heads=[1, 1, 2, 2],
                    mlp_ratios=[2, 2, 2, 2], sr_ratios=[4, 2, 1, 1], decoder_hidden_size=8),
    "beit-seg": hugging(SEGMENTATION, "BeitConfig", "BeitForSemanticSegmentation", pixels(),
                        use_relative_position_bias=True, out_indices=[1, 2, 3, 4], pool_scales=[1, 2],
                        use_auxiliary_head=False, **{**PLAIN, "num_hidden_layers": 4}),
    "mobilevit-seg": hugging(SEGMENTATION, "MobileViTConfig", "MobileViTForSemanticSegmentation", pixels(64),
                             num_labels=LABELS, image_size=64, hidden_sizes=[16, 16, 16],
                             neck_hidden_sizes=[8, 8, 8, 8, 8, 8, 16], num_attention_heads=2, aspp_out_channels=8,
                             atrous_rates=[1, 2, 3]),
    "maskformer-swin": hugging("vision transformer, hierarchical", "MaskFormerSwinConfig", "MaskFormerSwinModel",
                               pixels(), "last_hidden_state", image_size=32, patch_size=2, embed_dim=8, depths=[1, 1],
                               num_heads=[1, 2], window_size=4),
    "detr": hugging("detection", "DetrConfig", "DetrForObjectDetection", pixels(64), "pred_boxes",
                    backbone_config={"model_type": "resnet", **RESNET, "out_features": ["stage2"]},
                    backbone=None, use_timm_backbone=False, use_pretrained_backbone=False, d_model=16,
                    encoder_layers=1, decoder_layers=1,
                    encoder_ffn_dim=24, decoder_ffn_dim=24, encoder_attention_heads=2, decoder_attention_heads=2,
                    num_queries=5, num_labels=LABELS),
    "yolos": hugging("detection", "YolosConfig", "YolosForObjectDetection", pixels(), "pred_boxes",
                     **{**PLAIN, "image_size": [32, 32]}, num_detection_tokens=4),
    "deformable-detr": hugging("detection", "DeformableDetrConfig", "DeformableDetrForObjectDetection", pixels(64),
                    "pred_boxes",
                    backbone_config={"model_type": "resnet", **RESNET, "out_features": ["stage1", "stage2"]},
                    backbone=None, use_timm_backbone=False, use_pretrained_backbone=False, d_model=32,
                    encoder_layers=1, decoder_layers=2, num_feature_levels=2,
                    encoder_ffn_dim=24, decoder_ffn_dim=24, encoder_attention_heads=2, decoder_attention_heads=2,
                    encoder_n_points=2, decoder_n_points=2, num_queries=5, num_labels=LABELS),
    "clip": hugging("image and text", "CLIPConfig", "CLIPModel", _image_and_words, "logits_per_image",
                    projection_dim=16, **CLIP_PARTS),
    "siglip": hugging("image and text", "SiglipConfig", "SiglipModel", _image_and_words, "logits_per_image",
                      **CLIP_PARTS),
    "vilt": hugging("image and text", "ViltConfig", "ViltModel",
                    lambda rng: {**words(rng), **pixels()(rng), "pixel_mask": np.ones((BATCH, 32, 32), np.int64)},
                    "last_hidden_state", vocab_size=WORDS, max_position_embeddings=16, max_image_length=-1,
                    **{k: v for k, v in PLAIN.items() if k != "num_labels"}),
    "swin2sr": hugging("super-resolution", "Swin2SRConfig", "Swin2SRForImageSuperResolution", pixels(8),
                       "reconstruction", image_size=8, patch_size=1, embed_dim=8, depths=[2], num_heads=[2],
                       window_size=4, upscale=2),
    "perceiver": hugging("perceiver", "PerceiverConfig", "PerceiverForMaskedLM",
                         lambda rng: {"inputs": rng.integers(3, WORDS, (BATCH, 8)),
                                      "attention_mask": np.ones((BATCH, 8), np.int64)},
                         vocab_size=WORDS, d_model=16, d_latents=16, num_latents=4, num_blocks=1,
                         num_self_attends_per_block=1, num_self_attention_heads=2, num_cross_attention_heads=2,
                         max_position_embeddings=8, qk_channels=16, v_channels=16),
}  # fmt: skip
