"""fcos_R_50_FPN_1x.yaml as a LazyConfig: the same model, data and schedule."""

from detectron2 import model_zoo

from fcos_d2.data import FCOSDatasetMapper, load_dataset
from fcos_d2.engine import TrainLoader
from fcos_d2.evaluation import evaluator_for

from .common.fcos import model

dataloader = model_zoo.get_config("common/data/coco.py").dataloader
lr_multiplier = model_zoo.get_config("common/coco_schedule.py").lr_multiplier_1x
optimizer = model_zoo.get_config("common/optim.py").SGD
train = model_zoo.get_config("common/train.py").train

dataloader.train._target_ = TrainLoader  # saves its position in checkpoints
# Their errors name the file, the annotation or the image that cannot be used.
dataloader.train.dataset._target_ = load_dataset
dataloader.test.dataset._target_ = load_dataset
dataloader.train.dataset.masks = dataloader.test.dataset.masks = False
dataloader.train.mapper._target_ = FCOSDatasetMapper
dataloader.test.mapper._target_ = FCOSDatasetMapper
dataloader.train.mapper.use_instance_mask = False
dataloader.train.mapper.ignore_cut = dataloader.test.mapper.ignore_cut = True
dataloader.train.mapper.augmentations[0].short_edge_length = 800
dataloader.train.mapper.image_format = model.input_format
dataloader.evaluator._target_ = evaluator_for

# For 16 images per iteration. With dataloader.train.total_batch_size 2: lr 0.00125 and 8 times
# train.max_iter; lr_multiplier is relative to it.
optimizer.lr = 0.01
optimizer.fused = True  # so that no iteration waits for the GPU

train.init_checkpoint = "detectron2://ImageNetPretrained/MSRA/R-50.pkl"
train.output_dir = "output/fcos_R_50_FPN_1x"
