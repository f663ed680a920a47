"""Loop, checkpoints, evaluation: `train(load_config("config.yaml"))`."""

from crossan_fast.training.baselines import evaluate_baselines
from crossan_fast.training.batches import Batches
from crossan_fast.training.callbacks import Callback, StepEnd, StepLog, TensorBoard, WeightsAndBiases
from crossan_fast.training.evaluation import evaluate
from crossan_fast.training.optimizer import make_optimizer
from crossan_fast.training.processes import Processes, join_processes
from crossan_fast.training.result import Result
from crossan_fast.training.run_folder import RunFolder
from crossan_fast.training.sasrec import TrainedSasRec, train_sasrec
from crossan_fast.training.step import TrainingError, TrainStep
from crossan_fast.training.task import Task, open_task
from crossan_fast.training.train_config import EvaluationConfig, OptimizerConfig, TrainConfig, load_config
from crossan_fast.training.trainer import Trainer, train

__all__ = [
    "Batches",
    "Callback",
    "EvaluationConfig",
    "OptimizerConfig",
    "Processes",
    "Result",
    "RunFolder",
    "StepEnd",
    "StepLog",
    "Task",
    "TensorBoard",
    "TrainConfig",
    "TrainStep",
    "TrainedSasRec",
    "Trainer",
    "TrainingError",
    "WeightsAndBiases",
    "evaluate",
    "evaluate_baselines",
    "join_processes",
    "load_config",
    "make_optimizer",
    "open_task",
    "train",
    "train_sasrec",
]
