"""The launches with bases of 16 bits compile for every GPU we name, at the resources on record."""

from tests.kernels.triton_resource_gates import ResourceGates


class TestBasesOf16Bits(ResourceGates):
    base_bits = 16
