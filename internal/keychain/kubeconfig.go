package keychain

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"

	"go.yaml.in/yaml/v3"
)

// serviceAccount is where a pod has its account.
const serviceAccount = "/var/run/secrets/kubernetes.io/serviceaccount"

// inCluster returns a client of the cluster that this process is a pod of.
func inCluster(dir string) (*kubeAPI, error) {
	host, port := os.Getenv("KUBERNETES_SERVICE_HOST"), os.Getenv("KUBERNETES_SERVICE_PORT")
	if host == "" || port == "" {
		return nil, errors.New("this is no pod of a cluster (no KUBERNETES_SERVICE_HOST); name a kubeconfig")
	}
	pool, err := pool(nil, filepath.Join(dir, "ca.crt"))
	if err != nil {
		return nil, err
	}
	token := tokenFile(filepath.Join(dir, "token"))
	if _, err := token(); err != nil {
		return nil, err
	}
	transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool}, ForceAttemptHTTP2: true}
	return newKubeAPI("https://"+net.JoinHostPort(host, port), transport, token)
}

// kubeconfig is what matters of kubectl's file.
type kubeconfig struct {
	Current  string `yaml:"current-context"`
	Contexts []struct {
		Name    string `yaml:"name"`
		Context struct {
			Cluster string `yaml:"cluster"`
			User    string `yaml:"user"`
		} `yaml:"context"`
	} `yaml:"contexts"`
	Clusters []struct {
		Name    string      `yaml:"name"`
		Cluster kubeCluster `yaml:"cluster"`
	} `yaml:"clusters"`
	Users []struct {
		Name string   `yaml:"name"`
		User kubeUser `yaml:"user"`
	} `yaml:"users"`
}

type kubeCluster struct {
	Server     string `yaml:"server"`
	ServerName string `yaml:"tls-server-name"`
	CAFile     string `yaml:"certificate-authority"`
	CAData     string `yaml:"certificate-authority-data"`
	SkipVerify bool   `yaml:"insecure-skip-tls-verify"`
}

type kubeUser struct {
	Token        string `yaml:"token"`
	TokenFile    string `yaml:"tokenFile"`
	CertFile     string `yaml:"client-certificate"`
	CertData     string `yaml:"client-certificate-data"`
	KeyFile      string `yaml:"client-key"`
	KeyData      string `yaml:"client-key-data"`
	Username     string `yaml:"username"`
	Exec         any    `yaml:"exec"`
	AuthProvider any    `yaml:"auth-provider"`
}

// fromKubeconfig returns a client of the current context of a kubeconfig. Its errors have
// nothing of the file's values.
func fromKubeconfig(name string) (*kubeAPI, error) {
	text, err := os.ReadFile(name)
	if err != nil {
		return nil, err
	}
	var c kubeconfig
	if yaml.Unmarshal(text, &c) != nil {
		return nil, errors.New("it is no kubeconfig")
	}
	cluster, user, ok := c.current()
	if !ok {
		return nil, errors.New("its current-context, or the cluster or user of that, is missing")
	}
	if user.Exec != nil || user.AuthProvider != nil || user.Username != "" {
		return nil, errors.New("its user logs in by exec, auth-provider or password; use a token, tokenFile or client certificate")
	}
	dir := filepath.Dir(name)
	t := &tls.Config{ServerName: cluster.ServerName, InsecureSkipVerify: cluster.SkipVerify}
	if cluster.CAData != "" || cluster.CAFile != "" {
		if t.RootCAs, err = pool([]byte(cluster.CAData), beside(dir, cluster.CAFile)); err != nil {
			return nil, err
		}
	}
	if user.CertData != "" || user.CertFile != "" {
		cert, err := user.certificate(dir)
		if err != nil {
			return nil, err
		}
		t.Certificates = []tls.Certificate{cert}
	}
	return newKubeAPI(cluster.Server, &http.Transport{TLSClientConfig: t, ForceAttemptHTTP2: true}, user.token(dir))
}

// current returns cluster and user of the current context.
func (c kubeconfig) current() (cluster kubeCluster, user kubeUser, ok bool) {
	for _, x := range c.Contexts {
		if x.Name != c.Current {
			continue
		}
		for _, n := range c.Clusters {
			if n.Name == x.Context.Cluster {
				cluster, ok = n.Cluster, true
			}
		}
		for _, u := range c.Users {
			if u.Name == x.Context.User {
				return cluster, u.User, ok
			}
		}
	}
	return cluster, user, false
}

// token is how the user's is found; nil: there is none.
func (u kubeUser) token(dir string) func() (string, error) {
	switch {
	case u.TokenFile != "":
		return tokenFile(beside(dir, u.TokenFile))
	case u.Token != "":
		return func() (string, error) { return u.Token, nil }
	}
	return nil
}

func (u kubeUser) certificate(dir string) (tls.Certificate, error) {
	cert, err := dataOrFile(u.CertData, beside(dir, u.CertFile))
	if err != nil {
		return tls.Certificate{}, fmt.Errorf("client certificate: %w", err)
	}
	key, err := dataOrFile(u.KeyData, beside(dir, u.KeyFile))
	if err != nil {
		return tls.Certificate{}, fmt.Errorf("client key: %w", err)
	}
	pair, err := tls.X509KeyPair(cert, key)
	if err != nil {
		return pair, errors.New("its client certificate and key are no pair")
	}
	return pair, nil
}

// pool has the authorities in base64 data, or in a file.
func pool(data []byte, file string) (*x509.CertPool, error) {
	pem, err := dataOrFile(string(data), file)
	if err != nil {
		return nil, fmt.Errorf("certificate authority: %w", err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(pem) {
		return nil, errors.New("the certificate authority has no PEM certificate")
	}
	return pool, nil
}

func dataOrFile(data, file string) ([]byte, error) {
	if data == "" {
		return os.ReadFile(file)
	}
	p, err := base64.StdEncoding.DecodeString(data)
	if err != nil {
		return nil, errors.New("it is not base64")
	}
	return p, nil
}

// beside is a file's path as seen from the directory of the kubeconfig.
func beside(dir, name string) string {
	if name == "" || filepath.IsAbs(name) {
		return name
	}
	return filepath.Join(dir, name)
}
