"""What is trained in heads: few parameters, the rest of the model as it stands."""

from headwise.catalogue import register
from headwise.fit.copy_training import TrainedCopy, train_on_tasks
from headwise.fit.function_task import FunctionTask, function_task
from headwise.fit.head_lora import INTERVENTIONS, FittedAdapter, HeadAdapter, fit_head_lora
from headwise.fit.head_mask import HeadMask, train_head_masked
from headwise.fit.important_heads import ImportantHeadTraining, important_heads, specialisation, train_important_heads
from headwise.fit.localized_tuning import LoFiT, RankedHeads, Recipe, TunedOffsets, lofit, rank_heads, tune_offsets
from headwise.fit.objective import AnswerLoss, Objective, Preference, first_token
from headwise.fit.per_head import fit_edits, per_head
from headwise.fit.progress import Bar
from headwise.fit.soft_injection import FittedInjection, fit_injection, permuted, task_embedding
from headwise.fit.tasks import Task, classifying
from headwise.fit.training import Moment, Order, Schedule, Trained, batch_of, generator, train

for _each in INTERVENTIONS:
    register(_each)

__all__ = [
    "INTERVENTIONS",
    "AnswerLoss",
    "Bar",
    "FittedAdapter",
    "FittedInjection",
    "FunctionTask",
    "HeadAdapter",
    "HeadMask",
    "ImportantHeadTraining",
    "LoFiT",
    "Moment",
    "Objective",
    "Order",
    "Preference",
    "RankedHeads",
    "Recipe",
    "Schedule",
    "Task",
    "Trained",
    "TrainedCopy",
    "TunedOffsets",
    "batch_of",
    "classifying",
    "first_token",
    "fit_edits",
    "fit_head_lora",
    "fit_injection",
    "function_task",
    "generator",
    "important_heads",
    "lofit",
    "per_head",
    "permuted",
    "rank_heads",
    "specialisation",
    "task_embedding",
    "train",
    "train_head_masked",
    "train_important_heads",
    "train_on_tasks",
    "tune_offsets",
]
