"""The demonstration's model: causal, tied, and able to learn."""

import torch

from aiockpt.demo.model import VOCABULARY, Shape, Transformer

SHAPE = Shape(num_layers=2, num_heads=2, dim=16, context=8)


def model():
    torch.manual_seed(0)
    return Transformer(SHAPE)


def tokens(batch=3, length=8):
    return torch.randint(VOCABULARY, (batch, length))


def test_there_is_a_prediction_for_every_position():
    assert model()(tokens()).shape == (3, 8, VOCABULARY)


def test_a_prediction_does_not_depend_on_later_bytes():
    transformer = model().eval()
    one = tokens()
    other = one.clone()
    other[:, 5:] = (other[:, 5:] + 1) % VOCABULARY
    before, after = transformer(one), transformer(other)
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.equal(before[:, 5:], after[:, 5:])


def test_the_first_loss_is_that_of_a_guess():
    loss = model().loss(tokens(batch=8, length=9))
    assert abs(loss.item() - 5.545) < 0.1  # The logarithm of 256.


def test_training_brings_the_loss_down():
    transformer = model()
    batch = tokens(length=9)
    for _ in range(60):
        loss = transformer.loss(batch)
        parameters = list(transformer.parameters())
        with torch.no_grad():
            for parameter, gradient in zip(
                parameters, torch.autograd.grad(loss, parameters), strict=True
            ):
                parameter.sub_(0.5 * gradient)
    assert loss.item() < 3


def test_input_and_output_weights_are_one_tensor():
    transformer = model()
    assert transformer.head.weight is transformer.token.weight


def test_the_default_has_between_one_and_three_million_parameters():
    count = sum(p.numel() for p in Transformer(Shape()).parameters())
    assert 1e6 < count < 3e6
