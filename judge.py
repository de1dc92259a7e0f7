"""
Scores the samples of study.py and record.py, with a small classifier.

    judge = Judge(protocol, fresh, header, data, device)
    judge.real                      # the scores of other fresh images, in the place of samples
    line = judge.score_run(run, steps)    # its scores, and more, for the log

Samples are compared with fresh images, which nobody trained on. The classifier is trained on the
training images. It judges the labels, and its features (256) give a Frechet distance. Another one
is that of pixels, averaged 2 x 2; train.py's is of all pixels, so the two do not compare.
"""

import os

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from dual import total
from files import UserError, written
from frechet import frechet_distance
from loss import EULER
from model import Block, load_model
from pictures import grid, to_images
from sample import noise_and_labels, sample
from scores import (
    classify,
    moments,
    new_classifier,
    to_network,
    train_classifier,
    two_sample_accuracies,
)

CLASSES = 10
BATCH = 1000


class Judge:
    def __init__(self, protocol, fresh, header, data, device):
        """protocol: of study.py or record.py. header, data: of load_dataset.

        fresh: uint8 (2 n, C, H, W), image i of class i % 10. Samples are compared with the first n.
        The others are scored in the place of samples.
        """
        n = len(fresh) // 2
        self.protocol = protocol
        self.header = header
        self.device = device
        self.held_out = fresh[:n]
        self.y = torch.arange(n) % CLASSES  # classes of samples, in turn
        self.noise, _ = noise_and_labels(0, range(n), header["shape"])  # the same for all runs
        self.net = self.load_or_train(data)
        features, pixels = self.features_and_pixels(self.held_out)
        self.features_of_held_out = moments(features)
        self.pixels_of_held_out = moments(pixels)
        self.real = self.scores(fresh[n:], torch.arange(n, 2 * n) % CLASSES)

    def load_or_train(self, data):
        """The classifier, which is kept in the study's folder."""
        path = os.path.join(self.protocol.folder, "judge.safetensors")
        if os.path.exists(path):
            net = new_classifier(self.header["shape"][0], CLASSES).to(self.device).eval()
            try:
                net.load_state_dict(load_file(path))
            except (SafetensorError, RuntimeError):
                raise UserError(f"{path} is damaged: delete it, and it is trained again") from None
            return net
        images, labels = data["train_images"], data["train_labels"]
        net = train_classifier(images, labels, CLASSES, self.device)
        with written(path) as f:
            f.write(save(net.state_dict()))
        return net

    @torch.no_grad()
    def features_and_pixels(self, images):
        """Of uint8 (N, C, H, W): (N, 256), and (N, C, H/2, W/2)."""
        features = []
        pixels = []
        for batch in torch.from_numpy(np.ascontiguousarray(images)).split(BATCH):
            x = to_network(batch.to(self.device))
            features.append(self.net[:-1](x).cpu())
            pixels.append(torch.nn.functional.avg_pool2d(batch / 255, 2))
        return torch.cat(features), torch.cat(pixels)

    def scores(self, images, y):
        """{score: value} of images, uint8 (N, C, H, W), for which the classes y (N,) were asked."""
        features, pixels = self.features_and_pixels(images)
        right = classify(self.net, images) == y
        of_samples, of_fresh = two_sample_accuracies(images, self.held_out, self.device)
        return dict(
            features=frechet_distance(*self.features_of_held_out, *moments(features)),
            pixels=frechet_distance(*self.pixels_of_held_out, *moments(pixels)),
            label=right.double().mean().item(),
            two_sample=(of_samples + of_fresh) / 2,
            of_samples=of_samples,
            of_fresh=of_fresh,
        )

    @torch.no_grad()
    def score_run(self, run, steps):
        """The log's line of a run that train.py has finished. Saves its samples, a row an nfe."""
        name = self.protocol.folder_of(run)
        path = os.path.join("out", name, "ckpt.safetensors")
        model, about = load_model(path, self.device)
        scores = {}
        rows = []
        for nfe in self.protocol.nfes:
            images = self.sample(model, about, nfe, len(self.y))  # (N, H, W, C)
            rows.append(images[:CLASSES])
            scores[nfe] = self.scores(np.ascontiguousarray(images.transpose(0, 3, 1, 2)), self.y)
        with written(os.path.join(self.protocol.folder, name + ".png")) as f:
            grid(np.concatenate(rows), CLASSES).save(f, "PNG")
        return dict(
            run=run,
            steps=steps,
            commit=about["commit"],
            config=about["train"],
            scores=scores,
            block_rms=self.block_rms(model, about),
        )

    def sample(self, model, about, nfe, n, first=0):
        """Images (n, H, W, C), uint8, of the judge's noise and classes from `first` on."""
        euler = about["objective"] in EULER
        noise = self.noise[first : first + n]
        classes = self.y[first : first + n]
        images = []
        for x1, y in zip(noise.split(BATCH), classes.split(BATCH), strict=True):
            w = torch.full((len(y),), about["guidance"]["w"], device=self.device)
            x0 = sample(model, x1.to(self.device), y.to(self.device), w, nfe, euler)
            images.append(to_images(x0, self.header))
        return np.concatenate(images)

    @torch.no_grad()
    def block_rms(self, model, about):
        """The root mean square of each block's output, in one step of the last batch."""
        rms = []

        def watched(block, x, *conditions):
            x = Block.forward(block, x, *conditions)
            rms.append(total(x).square().mean().sqrt().item())
            return x

        model.run_block = watched
        first = (len(self.y) - 1) // BATCH * BATCH
        self.sample(model, about, 1, len(self.y) - first, first)
        return rms
