# SPDX-License-Identifier: MIT
"""The permission model: propagation, override, privilege separation."""

from __future__ import annotations

import pytest

from rehearsal.pve import access
from rehearsal.pve.errors import ApiError
from rehearsal.pve.state import Acl, NodeState, Token, User

USER, TOKEN = "auto@pve", "auto@pve!iac"


def state_with(*rules: Acl, privsep: bool = False) -> NodeState:
    state = NodeState(node="pve1", acl=list(rules))
    state.users[USER] = User(tokens={"iac": Token(digest=access.digest_of("s3cret"), privsep=privsep)})
    return state


def user_rule(path: str, role: str, *, propagate: bool = True) -> Acl:
    return Acl(path=path, kind="user", who=USER, role=role, propagate=propagate)


def test_rights_propagate_down() -> None:
    state = state_with(user_rule("/vms", "PVEVMUser"))
    assert access.may(state, USER, "/vms/101", "VM.Audit")
    assert not access.may(state, USER, "/storage/local", "VM.Audit")


def test_rights_without_propagation_stay_on_their_path() -> None:
    state = state_with(user_rule("/vms", "PVEVMUser", propagate=False))
    assert access.held(state, USER, "/vms")["VM.Audit"] == 0
    assert not access.may(state, USER, "/vms/101", "VM.Audit")


def test_a_deeper_rule_replaces_what_comes_from_above() -> None:
    state = state_with(user_rule("/", "Administrator"), user_rule("/vms/101", "PVEAuditor"))
    assert not access.may(state, USER, "/vms/101", "VM.PowerMgmt")
    assert access.may(state, USER, "/vms/102", "VM.PowerMgmt")


def test_no_access_takes_everything() -> None:
    state = state_with(user_rule("/", "Administrator"), user_rule("/vms", "NoAccess"))
    assert access.held(state, USER, "/vms/101") == {}


def test_a_separated_token_has_the_intersection() -> None:
    """With rules on the user alone it may do nothing."""
    state = state_with(user_rule("/vms", "PVEVMAdmin"), privsep=True)
    assert access.permission_map(state, TOKEN) == {}
    state.acl.append(Acl(path="/vms", kind="token", who=TOKEN, role="PVEAuditor"))
    assert access.held(state, TOKEN, "/vms/101") == {"VM.Audit": 1}


def test_a_token_that_is_not_separated_has_its_users_rights() -> None:
    state = state_with(user_rule("/vms", "PVEVMUser"))
    assert access.held(state, TOKEN, "/vms/101") == access.held(state, USER, "/vms/101")


def test_all_of_several_privileges_names_the_first_missing() -> None:
    state = state_with(user_rule("/vms", "PVEAuditor"))
    with pytest.raises(ApiError) as refused:
        access.require(state, USER, "/vms/101", "VM.Audit", "VM.Allocate")
    assert refused.value.message == "Permission check failed (/vms/101, VM.Allocate)"


def test_release_9_has_other_agent_privileges_than_8() -> None:
    assert "VM.Monitor" in access.privileges("8.4.21")
    assert "VM.Monitor" not in access.privileges("9.1.1")
    assert "VM.GuestAgent.Audit" in access.privileges("9.1.1")


def test_wrong_secret_and_unknown_token_are_the_same_answer() -> None:
    state = state_with()
    assert access.authenticate(state, f"{TOKEN}=s3cret") == TOKEN
    for header in (f"{TOKEN}=wrong", f"{USER}!gone=s3cret", "nobody@pve!x=y", "garbage"):
        with pytest.raises(ApiError) as refused:
            access.authenticate(state, header)
        assert (refused.value.status, refused.value.message) == (401, "Authentication failed!")
