//! What only an owner on the network has to bear.

use crate::site::{HASH, LAYOUT, LEASE, Owner, Reader, Way, folder};
use forebay_schemas::kv::{KvLayout, TokenRange};
use forebay_workers::kv::{
    KvOptions, ReadError,
    tcp::{TLS_NAME, TcpListen, TcpOptions, TcpOwner, Tls, TlsError, TlsFiles},
};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use std::{
    io::{Read, Write},
    net::TcpStream,
    time::Duration,
};

#[tokio::test(start_paused = true)]
async fn who_talks_nonsense_is_hung_up_on() {
    let folder = folder();
    let owner = Owner::start(&folder);
    for nonsense in
        [&b"GET / HTTP/1.1\r\nHost: kv\r\n\r\n"[..], b"fbkv-v1\n\xff\xff\xff\xff", b"fbkv-v1\n\x02\0\0\0{}"]
    {
        let mut stream = TcpStream::connect(owner.address()).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        stream.write_all(nonsense).unwrap();
        let mut answer = Vec::new();
        // A reset is as good as an end.
        let _ = stream.read_to_end(&mut answer);
        assert_eq!(answer, b"");
    }
    let reader = Reader::new(Way::Tcp);
    let (_sealed, handle) = owner.seal(LEASE);
    reader.find_and_read(&handle, &owner.lease).unwrap();
}

#[tokio::test(start_paused = true)]
async fn an_owner_serves_so_many_and_no_more() {
    let folder = folder();
    let owner = Owner::start(&folder);
    let (_sealed, handle) = owner.seal(LEASE);
    // Each with a connection of its own, which it keeps.
    let readers: Vec<_> = (0..256).map(|_| Reader::new(Way::Tcp)).collect();
    for reader in &readers {
        let transport = reader.way(&handle, &owner.lease);
        assert_eq!(transport.generation(&handle).unwrap(), handle.generation);
    }
    let late = Reader::new(Way::Tcp);
    let read = late.find_and_read(&handle, &owner.lease);
    assert!(matches!(read, Err(ReadError::Unreachable { .. })), "{read:?}");
    drop(readers);
    let give_up = std::time::Instant::now() + Duration::from_secs(30);
    while late.find_and_read(&handle, &owner.lease).is_err() {
        assert!(std::time::Instant::now() < give_up, "there is room again");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[tokio::test(start_paused = true)]
async fn time_is_up_for_who_claimed_and_dawdles() {
    let folder = folder();
    let (owner, reader) = (Owner::start(&folder), Reader::new(Way::Tcp));
    let (_sealed, handle) = owner.seal(LEASE);
    let transport = reader.way(&handle, &owner.lease);
    transport.claim(&handle).unwrap();
    // Nobody has needed the slot yet; but it may be needed at any time.
    tokio::time::sleep(LEASE + Duration::from_secs(5)).await;
    let read = transport.read(&handle, 0, &reader.region, &LAYOUT, 0);
    assert!(matches!(read, Err(ReadError::Refused { .. })), "{read:?}");
}

#[tokio::test]
async fn an_address_that_means_nothing_elsewhere_is_not_advertised() {
    let folder = folder();
    let owner = Owner::start(&folder);
    let listen = |advertise: Option<&str>| {
        let listen = TcpListen {
            address: ([0, 0, 0, 0], 0).into(),
            advertise: advertise.map(str::to_owned),
            tls: None,
        };
        let kv = (owner.region.clone(), LAYOUT, HASH);
        TcpOwner::listen(&listen, &owner.lease.worker, 1, kv, owner.leases.clone())
    };
    assert!(listen(None).is_err());
    assert_eq!(listen(Some("kv.example:7000")).unwrap().advertised(), "kv.example:7000");
    let advertised = listen(Some("kv.example")).unwrap().advertised().to_owned();
    let port: u16 = advertised.strip_prefix("kv.example:").unwrap().parse().unwrap();
    assert_ne!(port, 0);
}

/// An authority, and a worker's certificate of it, in a folder of their own.
struct Authority(tempfile::TempDir);

impl Authority {
    fn new() -> Authority {
        let folder = folder();
        let mut root = CertificateParams::new(Vec::new()).unwrap();
        root.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let root = CertifiedIssuer::self_signed(root, KeyPair::generate().unwrap()).unwrap();
        let key = KeyPair::generate().unwrap();
        let worker =
            CertificateParams::new(vec![TLS_NAME.to_owned()]).unwrap().signed_by(&key, &root).unwrap();
        std::fs::write(folder.path().join("ca.pem"), root.pem()).unwrap();
        std::fs::write(folder.path().join("cert.pem"), worker.pem()).unwrap();
        std::fs::write(folder.path().join("key.pem"), key.serialize_pem()).unwrap();
        Authority(folder)
    }

    fn files(&self) -> TlsFiles {
        let file = |name| self.0.path().join(name);
        TlsFiles { certificate: file("cert.pem"), key: file("key.pem"), authorities: file("ca.pem") }
    }
}

#[tokio::test(start_paused = true)]
async fn with_tls_only_workers_of_the_same_authority_read() {
    let (ours, theirs) = (Authority::new(), Authority::new());
    let load = |authority: &Authority| Some(Tls::load(&authority.files()).unwrap());
    let folder = folder();
    let mut owner = Owner::start(&folder);
    let reading = |tls: Option<Tls>, owner: &Owner| {
        let options = KvOptions { tcp: TcpOptions { streams: 2, tls }, ..Way::Tcp.options() };
        let reader = Reader::like(LAYOUT, &options);
        let (_sealed, handle) = owner.seal(LEASE);
        let read = reader.find_and_read(&handle, &owner.lease);
        assert_eq!(read.is_ok(), reader.has(&handle));
        read
    };
    let astray = |read| assert!(matches!(read, Err(ReadError::Unreachable { .. })), "{read:?}");
    reading(None, &owner).unwrap();
    astray(reading(load(&ours), &owner));
    owner.listen_with(owner.address(), load(&ours));
    reading(load(&ours), &owner).unwrap();
    astray(reading(None, &owner));
    astray(reading(load(&theirs), &owner));
    // A key that is not the certificate's is found out at the start.
    let mixed = TlsFiles { key: theirs.files().key, ..ours.files() };
    assert!(matches!(Tls::load(&mixed), Err(TlsError::Unfit(_))));
    let missing = TlsFiles { authorities: "/nowhere".into(), ..ours.files() };
    assert!(matches!(Tls::load(&missing), Err(TlsError::File { .. })));
}

#[tokio::test(start_paused = true)]
async fn large_pieces_arrive_whole_under_tls() {
    let tls = Some(Tls::load(&Authority::new().files()).unwrap());
    let layout = KvLayout { positions: 4096, ..LAYOUT };
    let folder = folder();
    let mut owner = Owner::like(folder.path().to_owned(), layout, 1, ([127, 0, 0, 1], 0).into());
    owner.listen_with(owner.address(), tls.clone());
    let reader =
        Reader::like(layout, &KvOptions { tcp: TcpOptions { streams: 2, tls }, ..Way::Tcp.options() });
    let (_sealed, handle) = owner.seal_tokens(1, TokenRange { start: 1, count: 4001 }, LEASE);
    reader.find_and_read(&handle, &owner.lease).unwrap();
    assert!(reader.has(&handle));
}
