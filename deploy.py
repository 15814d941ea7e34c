# SPDX-License-Identifier: MIT
"""The whole lab in reading order: preflight, hypervisor, VM, system, NVIDIA, containers.

    pyinfra inventory/lab.py deploy.py --dry     what would change
    pyinfra inventory/lab.py deploy.py           make it so

Every host crosses this file. The one step that all of them share keeps the guests behind their nodes.
"""

from pyinfra import state

from inventory import budgets, sharing
from inventory.access import tenants_of
from inventory.packages import TOOLKIT
from operations import containers, hypervisor, nvidia, run, system
from operations.files import File, files, render
from operations.proxmox import backup, config, mapping, vm

with run.of_host() as part:
    node, guest = part.node, part.guest

    if node:
        wanted = hypervisor.wanted(node)
        hypervisor.preflight(
            name="Check the node's cards and boot loader",
            wanted=wanted,
            guests_mib=sum(each.memory_mib for each in part.lab.guests_of(node)),
            allow_reboot=node.allow_reboot,
            allow_guest_shutdown=node.allow_guest_shutdown,
        )
    if guest:
        vm.preflight(name="Check the token's rights and the node's resources")

    if node:
        hypervisor.boot_configuration(name="Write modules, binding script and kernel command line", wanted=wanted)
        hypervisor.refresh_boot(name="Refresh initramfs and boot loader", wanted=wanted)
        hypervisor.reboot(
            name="Reboot the node where its boot configuration needs it",
            wanted=wanted,
            allowed=node.allow_reboot,
            timeout_s=node.reboot_timeout_s,
            allow_guest_shutdown=node.allow_guest_shutdown,
            guest_shutdown_timeout_s=node.guest_shutdown_timeout_s,
            cluster=node.cluster_name,
        )
        hypervisor.guests_back(name="Start the guests that a killed run had stopped")
        hypervisor.ready(name="Check that vfio-pci holds the cards", wanted=wanted)
        mapping.mappings(
            name="Name the cards in the cluster's resource mappings",
            devices={device.name: device.address or device.id for device in node.passthrough.devices},
        )
        files(
            name="Write cloud-init's vendor data",
            wanted={f"{node.snippets_dir}/{config.VENDOR_SNIPPET}": File(render("proxmox/vendor.yaml.j2"))},
            of="cloud-init's vendor data",
        )

    run.nodes_ready(name="Let the guests follow their nodes")

    if guest:
        vm.image(name="Download the cloud image")
        vm.create_or_update(name="Create or change the VM")
        backup.scheduled(name="Schedule the VM's backups")
        vm.started(name="Start the VM and wait for cloud-init")

        system.data_disk(
            name="Mount the data disk", by_id=f"/dev/disk/by-id/{config.DATA_DISK_ID}", mount=guest.data_disk.mount
        )
        system.base(
            name="Install base packages and keep the clock",
            distribution=guest.distribution,
            packages=guest.packages.base,
        )

    if guest and guest.gpu:
        driver, packages = guest.nvidia, guest.packages
        nvidia.repository(
            name="Add NVIDIA's repositories, keys and pins",
            distribution_path=packages.nvidia_repository,
            url=driver.repository,
            toolkit_url=driver.toolkit_repository,
            branch=driver.branch,
            version=driver.version,
            toolkit=TOOLKIT,
            toolkit_version=driver.toolkit_version,
            key_sha256=driver.key_sha256,
            toolkit_key_sha256=driver.toolkit_key_sha256,
        )
        nvidia.driver(
            name="Install the driver",
            packages=packages.driver,
            headers=packages.headers,
            branch=driver.branch,
            version=driver.version,
            vmid=guest.vmid,
            node=guest.node,
        )
        # Before a reboot that the driver may need: it must find a kernel with the module.
        nvidia.kernels(name="Keep to kernels that the driver is built for")
        nvidia.loaded(
            name="Load the installed driver",
            packages=packages.driver,
            branch=driver.branch,
            version=driver.version,
            allow_reboot=guest.allow_reboot,
            reboot_timeout_s=guest.boot_timeout_s,
            vmid=guest.vmid,
            node=guest.node,
        )
        nvidia.cuda(name="Install the CUDA toolkits", packages=driver.packages_of_cuda())
        nvidia.settings(
            name="Set power, clocks and modes of the GPU",
            persistence=driver.persistence,
            accounting=driver.accounting,
            power_limit_w=driver.power_limit_w,
            clocks=(driver.clocks.min_mhz, driver.clocks.max_mhz) if driver.clocks else None,
            ecc=driver.ecc,
            compute_mode="DEFAULT" if driver.sharing == "time-slice" else "EXCLUSIVE_PROCESS",
            allow_reboot=guest.allow_reboot,
            reboot_timeout_s=guest.boot_timeout_s,
        )
        nvidia.thermal(
            name="Watch the GPU's temperature", policy=driver.thermal.model_dump() if driver.thermal else None
        )
        nvidia.sharing(
            name="Share the GPU",
            mode=driver.sharing,
            uid=driver.service_uid,
            active_thread_percentage=driver.mps.active_thread_percentage,
            pinned_memory_limit_mib=driver.mps.pinned_memory_limit_mib,
            tenants={tenant.name: sharing.client(guest, tenant).environment for tenant in guest.tenants},
        )

    if guest:
        # Behind the driver's pins and holds, which it must find in place.
        system.upgrades(name="Install security upgrades by themselves, or none", enabled=guest.security_upgrades)
        if guest.engine.kind == "docker" and (docker := guest.packages.docker_repository):
            containers.repository(
                name="Add Docker's repository, key and pin",
                url=guest.engine.repository,
                distribution=docker[0],
                suite=docker[1],
                key_sha256=guest.engine.key_sha256,
            )
        containers.engine(
            name="Install the container engine",
            kind=guest.engine.kind,
            packages=guest.engine_packages,
            data=guest.data_disk.mount,
            registry_ca=guest.registry_certificates(),
            sharing=guest.nvidia.sharing if guest.gpu else "",
        )
    if guest and guest.gpu:
        nvidia.toolkit(
            name="Install the container toolkit and describe the GPU to it",
            packages=TOOLKIT,
            version=guest.nvidia.toolkit_version,
        )
        card = part.lab.node_of(guest).device(guest.gpu).card
        nvidia.health(
            name="Check the GPU's health",
            expected={
                "link_width": card.link_width,
                "link_generation": card.link_generation,
                "mps": guest.nvidia.mps.model_dump() if guest.nvidia.sharing == "mps" else None,
            },
        )
        # Services do not depend on one another: what one of them lacks leaves the others alone, and fails the guest at
        # the end.
        if ollama := guest.services.ollama:
            containers.ollama(
                name="Run Ollama",
                declared=ollama.model_dump(),
                card_memory_mib=card.memory_mib,
                data=guest.data_disk.mount,
                client=sharing.client(guest, budget_mib=ollama.memory_budget_mib, processes=ollama.max_loaded_models),
                engine=guest.engine.kind,
                _ignore_errors=True,
            )
        if pytorch := guest.services.pytorch:
            containers.pytorch(
                name="Let tenants run PyTorch jobs",
                image=pytorch.image,
                data=guest.data_disk.mount,
                uid=guest.nvidia.service_uid,
                tenants={
                    tenant.name: budgets.torch_shares(tenant.memory_limit_mib, card.memory_mib)
                    for tenant in guest.tenants
                    if tenant.may_use("pytorch")
                },
                client=sharing.client(guest),
                lock=pytorch.lock,
                index=guest.pip_index(),
                time_limit_h=pytorch.time_limit_h,
                host_memory_mib=pytorch.host_memory_mib,
                shm_mib=pytorch.shm_mib,
                network=pytorch.network,
                profiles=pytorch.profiles,
                simulated=guest.simulated or "",
                _ignore_errors=True,
            )
    if guest and (service := guest.services.milvus):
        containers.milvus.installed(
            name="Install Milvus' backups",
            data=guest.data_disk.mount,
            keep=service.keep_backups,
            _ignore_errors=True,
        )
        containers.milvus.milvus(
            name="Run Milvus",
            declared=service.model_dump(),
            tenants=tenants_of(guest, "milvus"),
            data=guest.data_disk.mount,
            passwords=containers.milvus.passwords_of(part.lab, guest),
            client=sharing.client(guest, budget_mib=service.memory_budget_mib) if guest.gpu else sharing.Client(),
            gpu=guest.gpu is not None,
            engine=guest.engine.kind,
            index=guest.pip_index(),
            prune=guest.prune,
            without_backup=bool(state.inventory.override_data.get("upgrade_without_backup")),
            _ignore_errors=True,
        )
    if guest:
        containers.undeclared(
            name="Look for containers that are not declared",
            names=list(guest.services.declared()),
            engine=guest.engine.kind,
            prune=guest.prune,
        )
        # Behind all that starts or replaces a service.
        containers.healing(
            name="Look after the services",
            policy=guest.healing.model_dump() if guest.healing else None,
            engine=guest.engine.kind,
            data=guest.data_disk.mount,
            gpu=guest.gpu is not None,
            services=containers.watched(guest.services, guest.gpu is not None),
        )
        # Behind the services: nobody is let in to what is not there yet.
        containers.proxy(name="Let the tenants reach the services", wanted=containers.proxy_of(part.lab, guest))
        run.services_settled(name="Check that every service took its declaration")
