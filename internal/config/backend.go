package config

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"reflect"
	"time"
)

// The kinds of backends, as Backend.Type names them.
const (
	TypeRegistry  = "registry"
	TypeS3        = "s3"
	TypeOSS       = "oss"
	TypeHTTPProxy = "http-proxy"
	TypeLocalFS   = "localfs"
	TypeLocalDisk = "localdisk"
)

// Backend says where the blobs of an image are. Exactly the field that Type names is
// set; with Type "" none is.
type Backend struct {
	Type      string     `key:"type"`
	Registry  *Registry  `key:"registry"`
	S3        *S3        `key:"s3"`
	OSS       *OSS       `key:"oss"`
	HTTPProxy *HTTPProxy `key:"http-proxy"`
	LocalFS   *LocalFS   `key:"localfs"`
	LocalDisk *LocalDisk `key:"localdisk"`
}

// HTTP is what all backends that speak HTTP have. In every form of the configuration
// the keys have the names that nydus gives them.
type HTTP struct {
	SkipVerify     bool              `key:"skip_verify"`     // accept any certificate
	CAFiles        []string          `key:"ca_cert_files"`   // PEM, trusted besides the system's
	ClientCert     string            `key:"client_cert"`     // PEM file; with ClientKey
	ClientKey      string            `key:"client_key"`      // PEM file
	Timeout        Duration          `key:"timeout"`         // a request without progress for so long is given up
	ConnectTimeout Duration          `key:"connect_timeout"` // for a connection and its TLS handshake
	RetryLimit     *int              `key:"retry_limit"`     // further attempts of a read; nil: not said
	Proxy          Proxy             `key:"proxy"`
	Mirrors        []Mirror          `key:"mirrors"` // asked in this order before the origin
	Headers        map[string]Secret `key:"headers"` // sent with each request
}

// Proxy is a forward proxy, such as Dragonfly's; with URL "" there is none.
type Proxy struct {
	URL                string   `key:"url"`                          // without a login
	Login              Secret   `key:"login"`                        // user:password; in nydus's forms it is part of the URL
	PingURL            string   `key:"ping_url"`                     // asked for the proxy's health; "": it is not asked
	Fallback           bool     `key:"fallback"`                     // go to the origin when the proxy does not work
	CheckInterval      Duration `key:"check_interval"`               // between two pings
	CheckPause         Duration `key:"check_pause_elapsed"`          // no pings after so long without a request
	UseHTTP            bool     `key:"use_http"`                     // ask the proxy for http, so that it sees the paths
	DragonflyScheduler string   `key:"dragonfly_scheduler_endpoint"` // accepted; peers are reached through the proxy
}

// Mirror is a host that has what the origin has.
type Mirror struct {
	Host          string            `key:"host"`     // host[:port], or with http:// or https:// before
	PingURL       string            `key:"ping_url"` // "": Host + "/v2"
	Headers       map[string]Secret `key:"headers"`
	CheckInterval Duration          `key:"health_check_interval"`
	CheckPause    Duration          `key:"health_check_pause_elapsed"`
	FailureLimit  int               `key:"failure_limit"` // errors in a row until it is left out
	AuthThrough   bool              `key:"auth_through"`  // send it the origin's authorization too
}

// Registry is a repository of an OCI registry.
type Registry struct {
	HTTP               `key:"-"`
	Scheme             string `key:"scheme"` // "" is https, and http where nydus falls back
	Host               string `key:"host"`   // host[:port]
	Repo               string `key:"repo"`
	Auth               Secret `key:"auth"`                         // base64 of user:password
	Token              Secret `key:"token" nydus:"registry_token"` // bearer, until it is refused
	Credentials        string `key:"credentials"`                  // CredentialsDocker: docker's configuration and helpers
	BlobURLScheme      string `key:"blob_url_scheme"`              // replaces the scheme of redirects
	BlobRedirectedHost string `key:"blob_redirected_host"`         // replaces the host of redirects
	HostsDir           string `key:"hosts_dir"`                    // of hosts.toml files, as containerd's certs.d
}

// CredentialsDocker makes Registry.Credentials ask docker's configuration.
const CredentialsDocker = "docker"

// S3 is a bucket of S3 or of anything that speaks it. Without an access key the SDK's
// chain of credentials is asked.
type S3 struct {
	HTTP            `key:"-"`
	Scheme          string `key:"scheme"`
	Endpoint        string `key:"endpoint"` // host[:port]; "": AWS
	Region          string `key:"region"`
	Bucket          string `key:"bucket_name"`
	Prefix          string `key:"object_prefix"`
	AccessKeyID     string `key:"access_key_id"`
	AccessKeySecret Secret `key:"access_key_secret"`
}

// OSS is a bucket of Alibaba's object storage. Without an access key it is read as anybody.
type OSS struct {
	HTTP            `key:"-"`
	Scheme          string `key:"scheme"`
	Endpoint        string `key:"endpoint"` // host[:port]
	Bucket          string `key:"bucket_name"`
	Prefix          string `key:"object_prefix"`
	AccessKeyID     string `key:"access_key_id"`
	AccessKeySecret Secret `key:"access_key_secret"`
}

// HTTPProxy is a server that gives blobs by their ids.
type HTTPProxy struct {
	HTTP `key:"-"`
	Addr string `key:"addr"` // http://, https://, or the path of a unix socket
	Path string `key:"path"`
}

// LocalFS is a file or a directory.
type LocalFS struct {
	BlobFile string   `key:"blob_file"` // the only blob
	Dir      string   `key:"dir"`       // of blobs
	AltDirs  []string `key:"alt_dirs"`  // asked after Dir
}

// LocalDisk is a block device.
type LocalDisk struct {
	Device     string `key:"device_path"`
	DisableGPT bool   `key:"disable_gpt"` // blobs are found by their offset, not by partition
}

func (h *HTTP) setDefaults() {
	h.Timeout = Duration(30 * time.Second)
	h.ConnectTimeout = Duration(5 * time.Second)
	h.Proxy.setDefaults()
}

func (p *Proxy) setDefaults() {
	p.Fallback = true
	p.CheckInterval, p.CheckPause = Duration(5*time.Second), Duration(300*time.Second)
}

func (m *Mirror) setDefaults() {
	m.CheckInterval, m.CheckPause = Duration(5*time.Second), Duration(300*time.Second)
	m.FailureLimit = 5
}

func (s *S3) setDefaults() {
	s.HTTP.setDefaults()
	s.Scheme = "https"
}

func (s *OSS) setDefaults() {
	s.HTTP.setDefaults()
	s.Scheme = "https"
}

// legacyKeys of nydus's forms are accepted and have no effect.
func (h *HTTP) legacyKeys() []string {
	return []string{"readahead", "readahead_sec", "auth_through", "disable_passthrough"}
}

func (l *LocalFS) legacyKeys() []string { return []string{"readahead", "readahead_sec"} }

// table is what the field that Type names points to, nil without one.
func (b Backend) table() any {
	switch {
	case b.Registry != nil:
		return *b.Registry
	case b.S3 != nil:
		return *b.S3
	case b.OSS != nil:
		return *b.OSS
	case b.HTTPProxy != nil:
		return *b.HTTPProxy
	case b.LocalFS != nil:
		return *b.LocalFS
	case b.LocalDisk != nil:
		return *b.LocalDisk
	}
	return nil
}

// Format shows the backend without secrets, whatever the verb. It is needed because fmt,
// where a verb does not suit a pointer (%s), prints what that points to and asks no
// Formatter below it.
func (b Backend) Format(f fmt.State, _ rune) { fmt.Fprintf(f, "{%s %+v}", b.Type, b.table()) }

// Equal reports whether the two are the same, credentials included.
func (b Backend) Equal(o Backend) bool { return reflect.DeepEqual(b, o) }

// WithoutCredentials is a copy without what may change while the backend stays the
// same: login, token and access key.
func (b Backend) WithoutCredentials() Backend {
	if b.Registry != nil {
		r := *b.Registry
		r.Auth, r.Token = "", ""
		b.Registry = &r
	}
	if b.S3 != nil {
		s := *b.S3
		s.AccessKeyID, s.AccessKeySecret = "", ""
		b.S3 = &s
	}
	if b.OSS != nil {
		s := *b.OSS
		s.AccessKeyID, s.AccessKeySecret = "", ""
		b.OSS = &s
	}
	return b
}

// Key is the same for two backends that differ in their credentials at most, and for no
// others: clients can be shared by it. It is a digest and holds no secret.
func (b Backend) Key() string {
	// State writes every field; of what it writes nothing can fail to be JSON.
	text, _ := json.Marshal(state(reflect.ValueOf(b.WithoutCredentials())))
	sum := sha256.Sum256(text)
	return b.Type + ":" + hex.EncodeToString(sum[:])
}
