package backend

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"
	"time"
)

// newTLSConfig returns nil when the defaults do.
func newTLSConfig(o HTTPOptions) (*tls.Config, error) {
	files := slices.DeleteFunc(slices.Clone(o.CAFiles), func(name string) bool { return name == "" })
	if len(files) == 0 && o.ClientCert == "" && o.ClientKey == "" && !o.SkipVerify {
		return nil, nil
	}
	c := &tls.Config{MinVersion: tls.VersionTLS12, InsecureSkipVerify: o.SkipVerify}
	var err error
	if len(files) > 0 {
		if c.RootCAs, err = readPool(files); err != nil {
			return nil, err
		}
	}
	switch {
	case (o.ClientCert == "") != (o.ClientKey == ""):
		return nil, errors.New("client certificate: certificate and key are needed both: " + o.ClientCert + o.ClientKey + " is alone")
	case o.ClientCert != "":
		cert := &clientCert{certFile: o.ClientCert, keyFile: o.ClientKey}
		if _, err := cert.get(nil); err != nil {
			return nil, err
		}
		c.GetClientCertificate = cert.get
	}
	return c, nil
}

// readPool returns the system's certificate authorities and those of files.
func readPool(files []string) (*x509.CertPool, error) {
	pool, err := x509.SystemCertPool()
	if err != nil {
		return nil, fmt.Errorf("read the system's CA certificates: %w", err)
	}
	for _, name := range files {
		pem, err := os.ReadFile(name)
		if err != nil {
			return nil, fmt.Errorf("read CA file: %w", err)
		}
		if !pool.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("read CA file: %s holds no PEM certificate", name)
		}
	}
	return pool, nil
}

// clientCert is a certificate in files that somebody else renews.
type clientCert struct {
	certFile, keyFile string

	// mu guards the fields below.
	mu      sync.Mutex
	changed [2]time.Time // modification times of what was read last
	cert    *tls.Certificate
}

// get is a tls.Config's GetClientCertificate. It fails only before the files were good
// for the first time: of two files that are being replaced one may be the old one.
func (c *clientCert) get(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	var changed [2]time.Time
	for i, name := range []string{c.certFile, c.keyFile} {
		if st, err := os.Stat(name); err == nil {
			changed[i] = st.ModTime()
		}
	}
	if c.cert != nil && changed == c.changed {
		return c.cert, nil
	}
	cert, err := tls.LoadX509KeyPair(c.certFile, c.keyFile)
	if err == nil {
		c.cert, c.changed = &cert, changed
	}
	if c.cert == nil {
		return nil, fmt.Errorf("client certificate %s with key %s: %w", c.certFile, c.keyFile, err)
	}
	return c.cert, nil
}
