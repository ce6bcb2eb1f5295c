//! Several machines on one: network namespaces on a bridge, each with an address and a host name of its own. Needs
//! root, or the like.

use std::{
    net::Ipv4Addr,
    process::Command,
    sync::atomic::{AtomicU32, Ordering},
};

/// A bridge between this machine's own namespace and others. Gone when dropped.
#[derive(Debug)]
pub struct Network {
    name: String,
    number: u32,
    hosts: AtomicU32,
}

/// A namespace on a [`Network`]. Gone when dropped, once the processes in it have ended.
#[derive(Debug)]
pub struct Namespace {
    name: String,
    address: Ipv4Addr,
}

impl Network {
    /// Makes a bridge. An error says why this machine has none: for want of rights, most likely.
    pub fn create() -> Result<Network, String> {
        let number = std::process::id() % 50_000;
        // Dropped halfway, it takes away what there is.
        let network = Network { name: format!("fbt{number}"), number, hosts: AtomicU32::new(1) };
        ip(&["link", "add", &network.name, "type", "bridge"])?;
        let address = format!("{}/24", network.address());
        ip(&["address", "add", &address, "dev", &network.name])?;
        ip(&["link", "set", &network.name, "up"])?;
        Ok(network)
    }

    /// This machine's address.
    pub fn address(&self) -> Ipv4Addr {
        self.host(1)
    }

    /// An address that nobody has.
    pub fn nowhere(&self) -> Ipv4Addr {
        self.host(254)
    }

    fn host(&self, host: u8) -> Ipv4Addr {
        Ipv4Addr::new(10, 50 + (self.number / 250) as u8, (self.number % 250) as u8, host)
    }

    /// Makes a namespace with an address of its own.
    pub fn namespace(&self) -> Result<Namespace, String> {
        let host = self.hosts.fetch_add(1, Ordering::Relaxed) + 1;
        let name = format!("{}-{host}", self.name);
        let (outer, inner) = (format!("{}a{host}", self.name), format!("{}b{host}", self.name));
        let namespace = Namespace { name, address: self.host(host as u8) };
        let name = namespace.name.as_str();
        ip(&["netns", "add", name])?;
        ip(&["link", "add", &outer, "type", "veth", "peer", "name", &inner, "netns", name])?;
        ip(&["link", "set", &outer, "master", &self.name, "up"])?;
        ip(&["-n", name, "address", "add", &format!("{}/24", namespace.address), "dev", &inner])?;
        ip(&["-n", name, "link", "set", &inner, "up"])?;
        ip(&["-n", name, "link", "set", "lo", "up"])?;
        Ok(namespace)
    }
}

impl Namespace {
    /// Its address on the network.
    pub fn address(&self) -> Ipv4Addr {
        self.address
    }

    /// The same command, run there. It becomes that command's process, so it can be signalled as ever.
    pub fn within(&self, command: &Command) -> Command {
        let mut within = Command::new("ip");
        let script = "echo \"$0\" > /proc/sys/kernel/hostname && exec \"$@\"";
        within.args(["netns", "exec", &self.name, "unshare", "--uts", "sh", "-c", script, &self.name]);
        within.arg(command.get_program()).args(command.get_args());
        for (name, value) in command.get_envs() {
            match value {
                Some(value) => within.env(name, value),
                None => within.env_remove(name),
            };
        }
        within
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        // What is in it goes with it: both ends of its cable.
        let _ = ip(&["netns", "delete", &self.name]);
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        let _ = ip(&["link", "delete", &self.name]);
    }
}

fn ip(arguments: &[&str]) -> Result<(), String> {
    let output = Command::new("ip").args(arguments).output().map_err(|error| format!("ip: {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!("ip {}: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr).trim()))
}
