//! The network between one process and NATS: a relay that can be cut, stopped and slowed.

use std::{
    io,
    net::{Ipv4Addr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::watch,
    task::JoinHandle,
};

/// Bytes that are passed on at once.
const PIECE: usize = 16 << 10;

/// How the network is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Weather {
    /// It works.
    Fair,
    /// Connections break, and there are no new ones.
    Cut,
    /// Connections stay and can be made, but nothing comes through: not even their end.
    Still,
    /// Every piece comes later by this.
    Slow(Duration),
}

/// A relay on a port of its own, gone when dropped.
#[derive(Debug)]
pub struct Link {
    address: SocketAddr,
    weather: watch::Sender<Weather>,
    accepting: JoinHandle<()>,
}

impl Link {
    /// To one of these addresses (`host:port`): the next that answers, if there are several.
    pub async fn to(servers: Vec<String>) -> io::Result<Link> {
        Link::at(Ipv4Addr::LOCALHOST, servers).await
    }

    /// The same, for processes that know this machine by another address.
    pub async fn at(address: Ipv4Addr, servers: Vec<String>) -> io::Result<Link> {
        let listener = TcpListener::bind((address, 0)).await?;
        let address = listener.local_addr()?;
        let (weather, _) = watch::channel(Weather::Fair);
        let accepting = tokio::spawn(accept(listener, servers.into(), weather.clone()));
        Ok(Link { address, weather, accepting })
    }

    /// Where a process is to connect.
    pub fn url(&self) -> String {
        format!("nats://{}", self.address)
    }

    /// Changes the weather.
    pub fn set(&self, weather: Weather) {
        self.weather.send_replace(weather);
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.set(Weather::Cut);
        self.accepting.abort();
    }
}

async fn accept(listener: TcpListener, servers: Arc<[String]>, weather: watch::Sender<Weather>) {
    let next = Arc::new(AtomicUsize::new(0));
    loop {
        let Ok((near, _)) = listener.accept().await else { continue };
        if *weather.borrow() != Weather::Cut {
            tokio::spawn(relay(near, servers.clone(), next.clone(), weather.subscribe()));
        }
    }
}

async fn relay(
    mut near: TcpStream,
    servers: Arc<[String]>,
    next: Arc<AtomicUsize>,
    weather: watch::Receiver<Weather>,
) {
    for _ in 0..servers.len() {
        let server = &servers[next.fetch_add(1, Ordering::Relaxed) % servers.len()];
        let Ok(mut far) = TcpStream::connect(server).await else { continue };
        let _ = (near.set_nodelay(true), far.set_nodelay(true));
        let ((near_in, near_out), (far_in, far_out)) = (near.split(), far.split());
        tokio::select! {
            _ = pass(near_in, far_out, weather.clone()) => {}
            _ = pass(far_in, near_out, weather) => {}
        }
        return;
    }
}

/// Passes bytes on in one direction, as the weather allows.
async fn pass(
    mut from: impl AsyncReadExt + Unpin,
    mut to: impl AsyncWriteExt + Unpin,
    mut weather: watch::Receiver<Weather>,
) -> io::Result<()> {
    let mut piece = vec![0; PIECE];
    let mut cut = weather.clone();
    loop {
        let bytes = tokio::select! {
            biased;
            _ = cut.wait_for(|weather| *weather == Weather::Cut) => return Ok(()),
            bytes = from.read(&mut piece) => bytes?,
        };
        let now = weather.wait_for(|weather| *weather != Weather::Still).await.map(|weather| *weather);
        match now {
            Ok(Weather::Slow(delay)) => tokio::time::sleep(delay).await,
            Ok(Weather::Fair | Weather::Still) => {}
            Ok(Weather::Cut) | Err(_) => return Ok(()),
        }
        if bytes == 0 {
            return Ok(());
        }
        to.write_all(&piece[..bytes]).await?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn says(stream: &mut TcpStream, text: &[u8]) -> io::Result<Vec<u8>> {
        stream.write_all(text).await?;
        let mut answer = vec![0; text.len()];
        stream.read_exact(&mut answer).await.map(|_| answer)
    }

    #[tokio::test]
    async fn a_link_has_all_weathers() {
        let echo = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let server = echo.local_addr().unwrap().to_string();
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = echo.accept().await {
                tokio::spawn(async move {
                    let (mut from, mut to) = stream.split();
                    let _ = tokio::io::copy(&mut from, &mut to).await;
                });
            }
        });
        // The first does not answer: the second is taken.
        let link = Link::to(vec!["127.0.0.1:1".to_owned(), server]).await.unwrap();
        let connect = || TcpStream::connect(link.address);
        let mut stream = connect().await.unwrap();
        assert_eq!(says(&mut stream, b"fair").await.unwrap(), b"fair");
        link.set(Weather::Still);
        let waiting = tokio::time::timeout(Duration::from_millis(100), says(&mut stream, b"still"));
        assert!(waiting.await.is_err());
        link.set(Weather::Slow(Duration::from_millis(20)));
        let mut late = [0; 5];
        stream.read_exact(&mut late).await.unwrap();
        assert_eq!(&late, b"still");
        link.set(Weather::Cut);
        assert!(says(&mut stream, b"cut").await.is_err());
        let refused = async { says(&mut connect().await?, b"no").await };
        assert!(refused.await.is_err());
        link.set(Weather::Fair);
        assert_eq!(says(&mut connect().await.unwrap(), b"again").await.unwrap(), b"again");
    }
}
