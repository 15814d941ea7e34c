# SPDX-License-Identifier: MIT
"""/access: users, roles, access rules, tokens, and what a caller may do."""

from __future__ import annotations

import secrets
import time
import uuid
from typing import Any

from rehearsal.pve import access
from rehearsal.pve.errors import ApiError, bad_parameters, die
from rehearsal.pve.routing import Call, Guard, Route, needs
from rehearsal.pve.state import Acl, Store, Token, User

_TICKET_LIFE = 7200


class AccountsApi:
    """`password` is root@pam's; other users have none here. Tickets are kept in memory only."""

    def __init__(self, store: Store, password: str) -> None:
        self._store = store
        self._password = password
        # ticket -> (user, CSRF token, time it expires)
        self._tickets: dict[str, tuple[str, str, float]] = {}

    def routes(self) -> list[Route]:
        user, token = "/access/users/{userid}", "/access/users/{userid}/token/{tokenid}"
        modify = needs("/access/groups", "User.Modify")
        roles = needs("/access", "Sys.Modify")
        return [
            Route("GET", "/access/permissions", self._permissions),
            Route("GET", "/access/users", self._users),
            Route("POST", "/access/users", self._add_user, modify),
            Route("GET", user, self._user, _self_or("Sys.Audit", "User.Modify")),
            Route("PUT", user, self._set_user, modify),
            Route("DELETE", user, self._remove_user, modify),
            Route("GET", user + "/token", self._tokens, _self_or("User.Modify")),
            Route("GET", token, self._token, _self_or("User.Modify")),
            Route("POST", token, self._add_token, _self_or("User.Modify")),
            Route("PUT", token, self._set_token, _self_or("User.Modify")),
            Route("DELETE", token, self._remove_token, _self_or("User.Modify")),
            Route("GET", "/access/roles", self._roles),
            Route("POST", "/access/roles", self._add_role, roles),
            Route("GET", "/access/roles/{roleid}", self._role),
            Route("PUT", "/access/roles/{roleid}", self._set_role, roles),
            Route("DELETE", "/access/roles/{roleid}", self._remove_role, roles),
            Route("GET", "/access/acl", self._acl),
            Route("PUT", "/access/acl", self._set_acl, needs("{path}", "Permissions.Modify")),
        ]

    # Tickets.

    def login(self, username: str, password: str) -> dict[str, Any]:
        """POST /access/ticket."""
        user = username if "@" in username else f"{username}@pam"
        if user != access.ROOT or not secrets.compare_digest(password.encode(), self._password.encode()):
            raise ApiError(401, "authentication failure")
        ticket = f"PVE:{user}:{int(time.time()):08X}::{secrets.token_hex(24)}"
        csrf = f"{int(time.time()):08X}:{secrets.token_hex(16)}"
        self._tickets[ticket] = (user, csrf, time.time() + _TICKET_LIFE)
        return {"ticket": ticket, "CSRFPreventionToken": csrf, "username": user, "cap": {}}

    def ticket_user(self, ticket: str, csrf: str, writes: bool) -> str:
        """Whose ticket it is; 401 for an unknown or an old one, and for a write without its CSRF token."""
        user, expected, expires = self._tickets.get(ticket, ("", "", 0.0))
        if expires < time.time():
            raise ApiError(401, "permission denied - invalid PVE ticket")
        if writes and csrf != expected:
            raise ApiError(401, "Permission denied - invalid csrf token")
        return user

    # What a caller may do.

    def _permissions(self, call: Call) -> dict[str, Any]:
        state = self._store.state
        who = call.text("userid", call.user)
        if who != call.user and who.partition("!")[0] != call.user:
            access.require(state, call.user, "/access", "Sys.Audit")
        if "path" in call.params:
            path = call.text("path")
            return {path: access.held(state, who, path)}
        return access.permission_map(state, who)

    # Users and tokens.

    def _known(self, call: Call) -> User:
        userid = call.text("userid")
        user = self._store.state.users.get(userid)
        if user is None:
            die(f"no such user ('{userid}')")
        return user

    def _users(self, call: Call) -> list[dict[str, Any]]:
        state = self._store.state
        every = access.may(state, call.user, "/access/groups", "User.Modify", "Sys.Audit")
        return [
            {"userid": userid, **_user_view(user), "realm-type": userid.partition("@")[2]}
            for userid, user in sorted(state.users.items())
            if every or userid == call.user.partition("!")[0]
        ]

    def _add_user(self, call: Call) -> None:
        userid = call.text("userid")
        if userid in self._store.state.users:
            die(f"create user failed: user '{userid}' already exists")
        if userid.partition("@")[2] not in ("pam", "pve"):
            die(f"create user failed: domain '{userid.partition('@')[2]}' does not exist")
        self._store.state.users[userid] = User(
            enable=call.flag("enable", True), comment=call.text("comment"), expire=call.number("expire")
        )

    def _user(self, call: Call) -> dict[str, Any]:
        user = self._known(call)
        return _user_view(user) | {"tokens": {name: _token_view(token) for name, token in user.tokens.items()}}

    def _set_user(self, call: Call) -> None:
        user = self._known(call)
        if "enable" in call.params:
            user.enable = call.flag("enable")
        if "comment" in call.params:
            user.comment = call.text("comment")
        if "expire" in call.params:
            user.expire = call.number("expire")

    def _remove_user(self, call: Call) -> None:
        userid, state = call.text("userid"), self._store.state
        self._known(call)
        del state.users[userid]
        state.acl = [entry for entry in state.acl if entry.who.partition("!")[0] != userid]

    def _tokens(self, call: Call) -> list[dict[str, Any]]:
        return [{"tokenid": name, **_token_view(token)} for name, token in sorted(self._known(call).tokens.items())]

    def _known_token(self, call: Call) -> Token:
        token = self._known(call).tokens.get(call.text("tokenid"))
        if token is None:
            die(f"no such token '{call.text('tokenid')}' for user '{call.text('userid')}'")
        return token

    def _token(self, call: Call) -> dict[str, Any]:
        return _token_view(self._known_token(call))

    def _add_token(self, call: Call) -> dict[str, Any]:
        name = call.text("tokenid")
        user = self._known(call)
        if len(name) < 2:
            bad_parameters({"tokenid": f"invalid format - value '{name}' does not look like a valid token ID\n"})
        if name in user.tokens:
            bad_parameters({"tokenid": "Token already exists."})
        value = str(uuid.uuid4())
        token = Token(
            digest=access.digest_of(value),
            privsep=call.flag("privsep", True),
            comment=call.text("comment"),
            expire=call.number("expire"),
        )
        user.tokens[name] = token
        return {"full-tokenid": f"{call.text('userid')}!{name}", "info": _token_view(token), "value": value}

    def _set_token(self, call: Call) -> dict[str, Any]:
        token = self._known_token(call)
        if "privsep" in call.params:
            token.privsep = call.flag("privsep")
        if "comment" in call.params:
            token.comment = call.text("comment")
        return _token_view(token)

    def _remove_token(self, call: Call) -> None:
        self._known_token(call)
        state, full = self._store.state, f"{call.text('userid')}!{call.text('tokenid')}"
        del self._known(call).tokens[call.text("tokenid")]
        state.acl = [entry for entry in state.acl if entry.who != full]

    # Roles.

    def _roles(self, call: Call) -> list[dict[str, Any]]:
        state = self._store.state
        return [
            {"roleid": name, "privs": ",".join(sorted(privileges)), "special": int(name not in state.roles)}
            for name, privileges in sorted(access.all_roles(state).items())
        ]

    def _role(self, call: Call) -> dict[str, int]:
        privileges = access.all_roles(self._store.state).get(call.text("roleid"))
        if privileges is None:
            die(f"role '{call.text('roleid')}' does not exist")
        return dict.fromkeys(sorted(privileges), 1)

    def _privileges(self, call: Call) -> list[str]:
        wanted = call.names("privs")
        for privilege in wanted:
            if privilege not in access.privileges(self._store.state.release):
                bad_parameters({"privs": f"invalid privilege '{privilege}'\n"})
        return wanted

    def _add_role(self, call: Call) -> None:
        role = call.text("roleid")
        if role in access.all_roles(self._store.state):
            die(f"create role failed: role '{role}' already exists")
        self._store.state.roles[role] = sorted(set(self._privileges(call)))

    def _set_role(self, call: Call) -> None:
        role, roles = call.text("roleid"), self._store.state.roles
        if role not in roles:
            special = role in access.all_roles(self._store.state)
            die(f"update role failed: role '{role}' is special" if special else f"role '{role}' does not exist")
        wanted = set(self._privileges(call)) | (set(roles[role]) if call.flag("append") else set())
        roles[role] = sorted(wanted)

    def _remove_role(self, call: Call) -> None:
        role, state = call.text("roleid"), self._store.state
        if role not in state.roles:
            die(f"role '{role}' does not exist")
        del state.roles[role]
        state.acl = [entry for entry in state.acl if entry.role != role]

    # Access rules.

    def _acl(self, call: Call) -> list[dict[str, Any]]:
        state = self._store.state
        return [
            {
                "path": entry.path,
                "type": entry.kind,
                "ugid": entry.who,
                "roleid": entry.role,
                "propagate": int(entry.propagate),
            }
            for entry in state.acl
            if access.may(state, call.user, entry.path, "Permissions.Modify")
        ]

    def _set_acl(self, call: Call) -> None:
        state = self._store.state
        path = "/" + call.text("path").strip("/")
        roles = call.names("roles")
        whos = [("user", who) for who in call.names("users")] + [("token", who) for who in call.names("tokens")]
        for role in roles:
            if role not in access.all_roles(state):
                die(f"role '{role}' does not exist")
        for kind, who in whos:
            userid, _, name = who.partition("!")
            if userid not in state.users:
                die(f"user '{userid}' does not exist")
            if kind == "token" and name not in state.users[userid].tokens:
                die(f"no such token '{name}' for user '{userid}'")
        for kind, who in whos:
            for role in roles:
                state.acl = [e for e in state.acl if (e.path, e.kind, e.who, e.role) != (path, kind, who, role)]
                if not call.flag("delete"):
                    rule = Acl(path=path, kind=kind, who=who, role=role, propagate=call.flag("propagate", True))
                    state.acl.append(rule)


def _self_or(*privileges: str) -> Guard:
    """The user itself (a token is not), or these privileges on /access/groups."""

    def check(store: Store, call: Call) -> None:
        if call.text("userid") != call.user:
            access.require_any(store.state, call.user, "/access/groups", *privileges)

    return check


def _user_view(user: User) -> dict[str, Any]:
    view: dict[str, Any] = {"enable": int(user.enable), "expire": user.expire}
    return view | ({"comment": user.comment} if user.comment else {})


def _token_view(token: Token) -> dict[str, Any]:
    view: dict[str, Any] = {"privsep": int(token.privsep), "expire": token.expire}
    return view | ({"comment": token.comment} if token.comment else {})
