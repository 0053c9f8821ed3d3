"""What happens in an optimizer step.

A trainer is a chain of classes, of which TRL's trainer is the base. Each class adds one concern,
and calls the methods of the class before it in this list; the last three are alternatives:

    SFT-, DPO-, KTOTrainer  TRL's, on transformers.Trainer with the loop over steps
    QuickStepTrainer        host_overhead.py: visits the whole model once per run, not per step
    ScheduledTrainer        schedule.py: learning rates that are never 0
    SharedStepTrainer       shared_steps.py: divides a step's examples over ranks
    ResumableTrainer        resumable.py: writes and reads checkpoints, stops on request
    GuardedTrainer          nonfinite.py: skips steps whose loss or gradient is not finite
    SupervisedTrainer       trainers.py: the loss of sft and cpt
    PreferenceTrainer       trainers.py: the loss of dpo, on ExampleTrainer
    JudgedTrainer           judged.py: the loss of kto, on ExampleTrainer

The loop calls their methods once per optimizer step, in this order:

    get_batch_samples       collects this rank's micro-batches, and counts the labels of all ranks
    training_step           per micro-batch: compute_loss, then the backward pass (with ZeRO-2, the
                            last one also clips and takes the optimizer step)
    _clip_grad_norm         scales the gradients down to max_grad_norm
    _get_grad_norm          checks losses and gradients of all ranks; drops the gradients of a bad
                            step, and raises Diverged after several bad steps in a row
    optimizer, scheduler    change the adapter and the learning rate
    on_step_end             agrees with all ranks whether a checkpoint or a stop is due
    _maybe_log_save_evaluate  logs, evaluates and writes the checkpoint

`nonfinite.train_through` runs the loop, and returns to a checkpoint after Diverged.
"""
